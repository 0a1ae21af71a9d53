#!/usr/bin/env python3
"""Two builds of outportd in one run: is a row of the benchmark slower than it was?

    python3 tests/bench/compare.py --base OLD/outportd --ours NEW/outportd
    python3 tests/bench/compare.py --base A --ours B --quick --rows 'raw-*' --rounds 5

The rows, the clients and their options are those of bench.py. The builds take turns within each
round of each row, and the first of them alternates, so that drift of the machine meets both
alike. The ratio of a row is the median of its rounds' ratios: above 1 the new build is better,
for rates and for times and sizes, which are better when they are smaller. Exits with 1 if a row
is below the bound, with 2 if a row that the old build can serve was not measured.
"""

import json
import sys
import tempfile

sys.dont_write_bytecode = True  # no __pycache__ in the source tree

import bench  # noqa: E402
from report import middle, ratio, short  # noqa: E402
from servers import Peer  # noqa: E402

# Issue 11's bound: noise of a quiet machine stays within 3 %.
BOUND = 0.97

# Units of which less is better.
COSTS = ("ms", "us", "MiB")


def parse():
    parser = bench.parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--base", required=True, type=bench.os.path.abspath,
                        help="the build to compare with")
    parser.add_argument("--bound", type=float, default=BOUND,
                        help=f"the least ratio that passes; default {BOUND}")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 7)
    return bench.settle(args)


def gain(row, results):
    """The median ratio of one row, turned so that more is better; None if it was not measured."""
    ours, base = (results.get((row.id, peer), []) for peer in ("ours", "base"))
    if row.unit in COSTS:
        return ratio(base, ours, "rate")
    return ratio(ours, base, "rate")


def line(row, results, value):
    figures = [middle(results[row.id, peer], "rate") for peer in ("base", "ours")]
    words = [f"{short(mid):>7} ({short(low)}..{short(high)})" for mid, low, high in figures]
    return f"{row.id:<34} x{value:.3f}  {words[0]} -> {words[1]} {row.unit}"


def judge(rows, results, reasons, bound):
    """Prints a line per row; the ids of those below the bound, and of those not measured."""
    slower, lost = [], []
    for row in rows:
        value = gain(row, results)
        if value is None:
            why = {peer: reasons.get((row.id, peer)) for peer in ("base", "ours")}
            print(f"{row.id:<34} not measured: {why['ours'] or why['base'] or 'no figure'}")
            if not why["base"]:
                lost.append(row.id)
            continue
        missed = value < bound
        print(line(row, results, value) + (f"  MISS (bound {bound})" if missed else ""))
        if missed:
            slower.append(row.id)
    return slower, lost


def main():
    args = parse()
    rows = bench.choose(args)
    peers = [Peer("base", "base", args.base, args.aio), Peer("ours", "ours", args.ours, args.aio)]
    missing = []
    bench.preflight(args, peers, missing)
    if not bench.shutil.which(args.base):
        sys.exit(f"{args.base} is missing: --base")
    with tempfile.TemporaryDirectory(prefix="outport-compare-", dir=args.dir) as folder:
        run = bench.Run(args, folder, peers, missing)
        print(bench.describe(args, folder, peers), flush=True)
        for number in range(args.rounds):
            for row in rows:
                print(f"round {number + 1}/{args.rounds} {row.id}", file=sys.stderr, flush=True)
                run.measure(row)
            peers.reverse()
    slower, lost = judge(rows, run.results, run.reasons, args.bound)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(run.as_json(rows, missing), file, indent=1)
    print(f"{len(rows)} rows, {len(slower)} below x{args.bound}: {', '.join(slower) or 'none'}")
    return 1 if slower else 2 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
