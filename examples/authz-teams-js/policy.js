// Teams and their exports, in JavaScript: who is in a team may use the exports whose names begin
// with one of the team's prefixes.
//
//   object-add {"qom-type": "authz-wasm", "id": "az", "plugin": "authz-teams", "config": {"teams": [
//     {"units": ["Backup"], "exports": [""], "read-only": true},
//     {"uids": [1000], "units": ["Web"], "exports": ["web-"], "max-iops": 500}]}}
//
// A peer is in a team by the organizational unit (OU) of its certificate, or by its user id at a
// unix socket.

const strings = { type: "array", items: { type: "string" } };

const optionsSchema = {
  type: "object",
  additionalProperties: false,
  required: ["teams"],
  properties: {
    teams: {
      type: "array",
      items: {
        type: "object",
        additionalProperties: false,
        required: ["exports"],
        properties: {
          units: strings,
          uids: { type: "array", items: { type: "integer", minimum: 0 } },
          exports: strings,
          "read-only": { type: "boolean" },
          "max-iops": { type: "integer", minimum: 0, maximum: 4294967295 },
        },
      },
    },
  },
};

let teams = [];

// The parts of a distinguished name, `\` taking a comma's meaning away.
export function units(identity) {
  const parts = identity.match(/(?:\\.|[^,\\])+/g) ?? [];
  return parts
    .filter((part) => part.startsWith("OU="))
    .map((part) => part.slice(3).replace(/\\(.)/g, "$1"));
}

function member(team, peer) {
  const named = units(peer.identity);
  return (
    (team.units ?? []).some((unit) => named.includes(unit)) ||
    (peer.uid !== undefined && peer.uid !== null && (team.uids ?? []).includes(peer.uid))
  );
}

export const meta = {
  describe() {
    return {
      name: "authz-teams",
      version: "0.1.0",
      description: "Teams and their exports",
      optionsSchema: JSON.stringify(optionsSchema),
    };
  },
};

export const authzPolicy = {
  // The host has held the options against the schema.
  open(options) {
    teams = JSON.parse(options).teams;
  },

  reconfigure(options) {
    teams = JSON.parse(options).teams;
  },

  isAllowed(identity) {
    return teams.some((team) => member(team, { identity }));
  },

  decide({ peer, exportName }) {
    const mine = teams.filter((team) => member(team, peer));
    const name = exportName ?? "";
    const team = mine.find((one) => one.exports.some((prefix) => name.startsWith(prefix)));
    if (team === undefined) {
      const who = mine.length === 0 ? "The peer is in no team" : "No team of the peer";
      return { tag: "deny", val: mine.length === 0 ? who : `${who} has the export '${name}'` };
    }
    return {
      tag: "allow",
      val: {
        readOnly: team["read-only"] ?? false,
        ttlMs: 0,
        maxIops: team["max-iops"] ?? 0,
        maxBytesPerSec: 0,
      },
    };
  },
};
