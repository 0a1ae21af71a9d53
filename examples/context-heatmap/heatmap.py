#!/usr/bin/python3
"""Prints which ranges of an export were written lately, by the context x-heat:age.

    heatmap.py nbd+unix:///disk?socket=nbd.sock [--width N]

One character for each piece of the disk: the age of its newest write in minutes (9: that or more),
or a dot where nothing was written. Needs libnbd's Python module.
"""

import argparse

import nbd

CONTEXT = "x-heat:age"
STEP = 1 << 30


def ages(handle):
    """(offset, length, age) of the whole export."""
    found = []
    offset, size = 0, handle.get_size()
    while offset < size:
        told = []

        def extent(context, _offset, entries, _error, told=told):
            if context == CONTEXT:
                told.extend(entries)

        handle.block_status(min(STEP, size - offset), offset, extent)
        for length, age in zip(told[0::2], told[1::2]):
            length = min(length, size - offset)
            found.append((offset, length, age))
            offset += length
    return found


def draw(found, size, width):
    cells = [0] * width
    for offset, length, age in found:
        if age == 0:
            continue
        first, last = offset * width // size, (offset + length - 1) * width // size
        for cell in range(first, last + 1):
            cells[cell] = min(age, cells[cell] or age)
    return "".join(str(min(age, 9)) if age else "." for age in cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uri")
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    handle = nbd.NBD()
    handle.add_meta_context(CONTEXT)
    handle.connect_uri(args.uri)
    if not handle.can_meta_context(CONTEXT):
        raise SystemExit(f"The export does not offer {CONTEXT}: is the plugin attached?")
    print(draw(ages(handle), handle.get_size(), args.width))
    handle.shutdown()


if __name__ == "__main__":
    main()
