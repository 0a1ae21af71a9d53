"""The life of an export, told by QEMU's own client library: MONITOR NBD-SOCKET IMAGE."""

import asyncio
import subprocess
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(monitor, nbd, image):
    client = QMPClient("test")
    await client.connect(monitor)
    file = {"driver": "file", "filename": image}
    await client.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
    address = {"type": "unix", "data": {"path": nbd}}
    await client.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "e0", "node-name": "disk", "writable": True}
    await client.execute("block-export-add", export)
    # Several at once: the library sends them all and matches the answers by id.
    lists = await asyncio.gather(*(client.execute("query-block-exports") for _ in range(20)))
    assert all(len(exports) == 1 and exports[0]["id"] == "e0" for exports in lists), lists
    print("exported")

    uri = f"nbd+unix:///disk?socket={nbd}"
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 4k 8k", uri], check=True,
                   stdout=subprocess.DEVNULL)
    with open(image, "rb") as stored:
        stored.seek(4096)
        assert stored.read(8192) == b"\x5a" * 8192
    print("written")

    # A client that stays: qemu-io waits for its next command.
    attached = subprocess.Popen(["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)
    attached.stdin.write(b"read 4k 4k\n")
    attached.stdin.flush()
    while b"read 4096/4096" not in attached.stdout.readline():
        pass
    try:
        await client.execute("block-export-del", {"id": "e0"})
    except ExecuteError as refused:
        assert refused.error_class == "GenericError", refused
        assert str(refused) == "export 'e0' still in use", refused
        print("still in use")
    with client.listener("BLOCK_EXPORT_DELETED") as events:
        await client.execute("block-export-del", {"id": "e0", "mode": "hard"})
        event = await events.get()
        assert event["data"] == {"id": "e0"}, event
        assert events.empty()
    print("deleted")
    attached.communicate(timeout=30)

    await client.execute("nbd-server-stop")
    await client.execute("blockdev-del", {"node-name": "disk"})
    assert await client.execute("query-named-block-nodes") == []
    await client.execute("quit")
    print("quit")
    # The daemon closes the connection, which the library takes for an error that it tells here.
    try:
        await client.disconnect()
    except EOFError:
        pass


asyncio.run(main(*sys.argv[1:]))
