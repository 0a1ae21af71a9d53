import assert from "node:assert/strict";
import test from "node:test";

import { authzPolicy, meta, units } from "./policy.js";

const options = {
  teams: [
    { units: ["Backup"], exports: [""], "read-only": true },
    { uids: [1000], units: ["Web"], exports: ["web-"], "max-iops": 500 },
  ],
};

function ask(exportName, peer) {
  authzPolicy.open(JSON.stringify(options));
  return authzPolicy.decide({ peer: { identity: "", ...peer }, exportName });
}

test("a member of a team uses its exports", () => {
  assert.equal(ask("web-1", { uid: 1000 }).val.maxIops, 500);
  assert.equal(ask("web-1", { identity: "CN=a,OU=Web,O=Acme" }).tag, "allow");
  assert.equal(ask("anything", { identity: "CN=b,OU=Backup" }).val.readOnly, true);
});

test("everybody else is told why not", () => {
  assert.deepEqual(ask("db", { uid: 1000 }), {
    tag: "deny",
    val: "No team of the peer has the export 'db'",
  });
  assert.deepEqual(ask("web-1", { uid: 1 }), { tag: "deny", val: "The peer is in no team" });
  assert.equal(ask("web-1", {}).tag, "deny");
});

test("a name cannot pretend to be a unit", () => {
  assert.deepEqual(units("CN=x\\,OU=Web,OU=a\\,b"), ["a,b"]);
  assert.equal(ask("web-1", { identity: "CN=x\\,OU=Web" }).tag, "deny");
  authzPolicy.open(JSON.stringify(options));
  assert.equal(authzPolicy.isAllowed("OU=Web"), true);
  assert.equal(authzPolicy.isAllowed("CN=OU=Web"), false);
});

test("the schema is JSON", () => {
  assert.equal(JSON.parse(meta.describe().optionsSchema).type, "object");
});
