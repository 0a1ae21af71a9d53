#!/usr/bin/env bash
# One would guess: a reader of a disk image over HTTP that sends the ETag with every range, as
# If-Match or as If-Range, is told (412 or 200) when the file was replaced; at least one of the
# two headers works everywhere.
#
# What happens, with file servers that announce ETag and Accept-Ranges:
#                       If-Match: old ETag    If-Range: old ETag
#   express             412                   200, the whole new file
#   aiohttp             412                   206 with bytes of the NEW file
#   starlette, flask    206, NEW file         200
#   tornado             206, NEW file         206, NEW file; and both with the OLD ETag
# So no header protects from mixing the bytes of two images, and with tornado, which computes an
# ETag once for each path, comparing ETags does not either: only Last-Modified differs.
#
# Why it matters to a block export daemon: an http or S3 node sends If-Match, and besides that
# compares ETag, Last-Modified and total length of *every* 206 with those of the open, even
# where there is an ETag; a difference fails the node for good.
#
# Seen with starlette 1.10.0, aiohttp 3.14.5, flask 3.1.3 (werkzeug 3.1.9), tornado 6.6.1,
# express 5.1.0, Python 3.11, Node 20.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'kill $(jobs -p) 2> kill.log || true; wait; rm -rf "$dir"' EXIT
for tool in python3 node npm; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check starlette==1.10.0 \
    uvicorn==0.35.0 aiohttp==3.14.5 flask==3.1.3 werkzeug==3.1.9 tornado==6.6.1
npm install --silent --no-audit --no-fund --ignore-scripts --cache npm express@5.1.0
mkdir files

cat > serve.py <<'PY'
import asyncio, logging, sys
name, port = sys.argv[1], int(sys.argv[2])
logging.disable(logging.CRITICAL)
if name == "starlette":
    import uvicorn
    from starlette.applications import Starlette
    from starlette.staticfiles import StaticFiles
    app = Starlette()
    app.mount("/", StaticFiles(directory="files"))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")
elif name == "aiohttp":
    from aiohttp import web
    app = web.Application()
    app.router.add_static("/", "files")
    web.run_app(app, host="127.0.0.1", port=port, print=None)
elif name == "flask":
    from flask import Flask
    Flask("files", static_folder="files", static_url_path="").run(host="127.0.0.1", port=port)
elif name == "tornado":
    import tornado.web
    async def serve():
        handler = (r"/(.*)", tornado.web.StaticFileHandler, {"path": "files"})
        tornado.web.Application([handler]).listen(port, "127.0.0.1")
        await asyncio.Event().wait()
    asyncio.run(serve())
PY
cat > serve.js <<'JS'
const express = require("express"), app = express();
app.use(express.static("files"));
app.listen(+process.argv[2], "127.0.0.1");
JS
cat > ask.py <<'PY'
import http.client, os, sys, time
port = int(sys.argv[1])

def put(letter):
    with open("files/new", "wb") as file:
        file.write(letter * 100000)
    os.replace("files/new", "files/disk")

def get(**headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/disk", headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read()

put(b"a")
for _ in range(200):
    try:
        answer, _ = get(Range="bytes=0-9")
        break
    except OSError:
        time.sleep(0.1)
etag, date = answer.getheader("ETag"), answer.getheader("Last-Modified")
assert answer.status == 206 and etag, "no ETag or no ranges"
time.sleep(1.1)  # another second, another ETag, with every server
put(b"b")
said = []
for header in ("If_Match", "If_Range"):
    answer, body = get(Range="bytes=10-19", **{header: etag})
    kept = "+old-ETag" if answer.getheader("ETag") == etag else ""
    assert answer.status != 206 or body == b"b" * 10
    assert answer.getheader("Last-Modified") != date or answer.status == 412
    said.append(f"{answer.status}{kept}")
print(" ".join(said))
PY
ports=$(python3 -c "
import socket
socks = [socket.socket() for _ in range(5)]
for sock in socks: sock.bind(('127.0.0.1', 0))
print(*(sock.getsockname()[1] for sock in socks))")
set -- $ports
changed=0
while read -r name recorded; do
    if [ "$name" = express ]; then node serve.js "$1" & else venv/bin/python serve.py "$name" "$1" &
    fi > "$name.log" 2>&1
    seen=$(python3 ask.py "$1")
    echo "$name: status for If-Match and If-Range with the old ETag: $seen"
    [ "$seen" = "$recorded" ] || { echo "changed: recorded was $recorded"; changed=1; }
    shift
done <<LIST
express 412 200
aiohttp 412 206
starlette 206 200
flask 206 200
tornado 206+old-ETag 206+old-ETag
LIST
[ $changed = 0 ] && echo "as recorded: each 206 held bytes of the new file and its Last-Modified"
exit $changed
