#!/usr/bin/env bash
# One would guess: a file server that refuses a range behind the end of a file (416) sends no
# body or a short error page.
#
# What happens: serve-handler, the handler of the npm program `serve`, answers 416 and then sends
# the whole file, with its full Content-Length. The header Content-Range says "bytes */SIZE" as
# it should.
#
# Why it matters to a block export daemon: a reader that probes behind the end (a growing image,
# readahead, a size taken from elsewhere) and politely drains the body before it uses the
# connection again downloads the image once for each such request. An http node reads the body
# of an error only up to a small limit, and closes the connection where more comes.
#
# Seen with serve-handler 6.1.8, beside express 5.1.0 (a page of some hundred bytes), Node 20.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'kill $(jobs -p) 2> kill.log || true; wait; rm -rf "$dir"' EXIT
for tool in node npm; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
npm install --silent --no-audit --no-fund --ignore-scripts --cache npm \
    serve-handler@6.1.8 express@5.1.0
echo "Node $(node --version)"
mkdir files
head -c 3000000 /dev/urandom > files/disk
cat > ask.js <<'JS'
const http = require("http"), handler = require("serve-handler"), express = require("express");
const app = express();
app.use(express.static("files"));
const servers = {
  "serve-handler": http.createServer((ask, answer) => handler(ask, answer, { public: "files" })),
  express: http.createServer(app),
};
async function ask(server) {
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const url = `http://127.0.0.1:${server.address().port}/disk`;
  const answer = await fetch(url, { headers: { range: "bytes=3000000-3000511" } });
  const body = await answer.arrayBuffer();
  server.close();
  return `${answer.status} ${answer.headers.get("content-range")} body ${body.byteLength}`;
}
(async () => {
  const seen = {};
  for (const [name, server] of Object.entries(servers)) {
    seen[name] = await ask(server);
    console.log(`${name}: ${seen[name]}`);
  }
  const same = seen["serve-handler"] === "416 bytes */3000000 body 3000000" &&
    /^416 .* body \d{1,4}$/.test(seen.express);
  console.log(same ? "as recorded" : "changed");
  process.exit(same ? 0 : 1);
})();
JS
node ask.js
