"""Tables: figures with median and range, ratios, and the design's bounds passed or missed."""

from statistics import median

from rows import PINS


def middle(samples, key):
    values = [sample[key] for sample in samples if sample.get(key) is not None]
    return (median(values), min(values), max(values)) if values else None


def ratio(mine, theirs, key):
    """Median of the ratios round by round: drift between rounds cancels out."""
    pairs = [(a.get(key), b.get(key)) for a, b in zip(mine, theirs)]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return median(ratios) if ratios else None


def short(value):
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def verdict(target, row, results):
    """(text, passed) of one bound; passed is None when it could not be judged."""
    mine = results.get((row.id, "ours"))
    if not mine:
        return "not measured", None
    if target.measure == "below":
        value = middle(mine, "rate")[0]
        return judge(value / target.bound, False, f"{value:.1f} {row.unit}, below {target.bound:g}")
    theirs, name = results.get((row.id, target.peer)), target.peer
    if not theirs and (target.peer, "ours") in results:
        theirs, name = results[target.peer, "ours"], f"our {target.peer}"
    value = ratio(mine, theirs, target.measure) if theirs else None
    if value is None:
        return f"{target.measure} vs {name}: not measured", None
    upward = target.measure == "rate"
    word = "at least" if upward else "CPU at most"
    return judge(value / target.bound, upward, f"x{value:.2f} of {name}, {word} {target.bound:g}")


def judge(share, upward, text):
    passed = share >= 1 if upward else share <= 1
    by = abs(share - 1) * 100
    return f"{text}: {'pass' if passed else 'MISS'} by {by:.0f} %", passed


def print_row(row, peers, results, reasons):
    print(f"\n{row.id}: {row.title}; {PINS[row.pin]}")
    mine = results.get((row.id, "ours"))
    for peer in peers:
        samples = results.get((row.id, peer.id))
        if not samples:
            print(f"  {peer.title:<18} not measured: {reasons.get((row.id, peer.id), 'skipped')}")
            continue
        value, low, high = middle(samples, "rate")
        line = f"  {peer.title:<18} {short(value):>7} {row.unit} ({short(low)}..{short(high)})"
        line = f"{line:<52}"
        cost = middle(samples, "cpu")
        if cost:
            line += f" server {cost[0]:>7.2f} us/op ({cost[1]:.2f}..{cost[2]:.2f})"
        if peer.id != "ours" and mine:
            against = ratio(mine, samples, "rate")
            line += f"  ours x{against:.2f}" if against else ""
            against = ratio(mine, samples, "cpu")
            line += f", CPU x{against:.2f}" if against else ""
        flush = middle(samples, "flush_ms")
        line += f"  flush {flush[0]:.0f} ms" if flush else ""
        busy = middle(samples, "client_busy")
        if busy and busy[0] > 0.95 and (middle(samples, "server_busy") or [1])[0] < 0.9 \
                and row.pin != "one":
            line += "  [the client is the bottleneck]"
        if any(sample.get("errors") for sample in samples):
            line += "  [I/O ERRORS]"
        print(line)
    for target in row.targets:
        print(f"    -> {verdict(target, row, results)[0]}")


def print_summary(rows, results, missing):
    print("\nThe design's bounds:")
    counts = {True: 0, False: 0, None: 0}
    for row in rows:
        for target in row.targets:
            text, passed = verdict(target, row, results)
            counts[passed] += 1
            mark = {True: "pass", False: "MISS", None: " -- "}[passed]
            print(f"  {mark}  {row.id:<28} {text}")
    print(f"  {counts[True]} passed, {counts[False]} missed, {counts[None]} not judged")
    if missing:
        print("\nNot measured:")
        for text in missing:
            print(f"  {text}")
