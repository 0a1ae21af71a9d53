//! Distinguished names are spelled as QEMU spells them: both servers admit whom a rule with our
//! spelling names, and nobody whom it does not.

use outport_export::tls::{Certificate, spell};
use serde_json::json;

use super::pki::{Profile, UTF8, attribute, name, rdn, tlv};
use super::support::{Daemon, Qmp, has};
use super::{Served, World};

const CN: &str = "2.5.4.3";
const O: &str = "2.5.4.10";
const C: &str = "2.5.4.6";
const DC: &str = "0.9.2342.19200300.100.1.25";
const UID: &str = "0.9.2342.19200300.100.1.1";
const EMAIL: &str = "1.2.840.113549.1.9.1";
const PRINTABLE: u8 = 19;
const TELETEX: u8 = 20;
const IA5: u8 = 22;
const UNIVERSAL: u8 = 28;
const BMP: u8 = 30;

fn one(kind: &str, tag: u8, value: &[u8]) -> Vec<u8> {
    name(&[rdn(&[attribute(kind, tag, value)])])
}

fn text(value: &str) -> Vec<u8> {
    one(CN, UTF8, value.as_bytes())
}

/// Names and what both servers make of them; `None`: a name that nobody admits.
fn names() -> Vec<(Vec<u8>, Option<&'static str>)> {
    let parts = [
        (C, PRINTABLE, "GB"),
        ("2.5.4.8", UTF8, "London"),
        (O, UTF8, "Example Home"),
        ("2.5.4.11", UTF8, "Lab"),
        (CN, UTF8, "laptop.example.com"),
    ];
    let parts = parts.map(|(kind, tag, value)| rdn(&[attribute(kind, tag, value.as_bytes())]));
    let utf8 = |kind, value: &str| attribute(kind, UTF8, value.as_bytes());
    vec![
        (
            name(&parts),
            Some("C=GB,ST=London,O=Example Home,OU=Lab,CN=laptop.example.com"),
        ),
        (
            name(&[rdn(&[utf8(CN, "a"), utf8(UID, "u")]), rdn(&[utf8(O, "x")])]),
            Some("CN=a+UID=u,O=x"),
        ),
        (
            name(&[rdn(&[utf8(CN, "a"), utf8(CN, "b"), utf8(O, "c")])]),
            Some("CN=a+CN=b+O=c"),
        ),
        (
            name(&[rdn(&[utf8(CN, "a"), utf8("1.2.3.4", "b")])]),
            Some("1.2.3.4=#0c0162+CN=a"),
        ),
        (
            name(&[rdn(&[utf8(CN, "a")]), rdn(&[utf8(CN, "b")])]),
            Some("CN=a,CN=b"),
        ),
        (
            text("a,b+c\"d\\e<f>g;h=i#j"),
            Some("CN=a\\,b\\+c\\\"d\\\\e\\<f\\>g\\;h=i#j"),
        ),
        (text("#a"), Some("CN=\\#a")),
        (text("  a  "), Some("CN=\\  a \\ ")),
        (text(" "), Some("CN=\\ ")),
        (text("=a="), Some("CN==a=")),
        (text("a\tb\nc"), Some("CN=a\tb\nc")),
        (
            text("\u{e9}\u{6f22}\u{1f600}"),
            Some("CN=\u{e9}\u{6f22}\u{1f600}"),
        ),
        (one(O, TELETEX, b"abc"), Some("O=abc")),
        (one(O, TELETEX, b"no\xe9"), Some("O=\\#6e6fe9")),
        (one(O, TELETEX, b"a\x7fb"), Some("O=\\#617f62")),
        (one(O, BMP, b"\0a\0\xe9\0,"), Some("O=a\u{e9}\\,")),
        (one(O, BMP, b"\xd8\x3d\xde\x00"), Some("O=\u{1f600}")),
        (one(O, BMP, b"\xd8\x3d"), Some("O=\\#d83d")),
        (one(O, BMP, b"\0\0\0a"), Some("O=#1e0400000061")),
        (one(O, UNIVERSAL, b"\0\0\0a"), Some("O=\\#00000061")),
        (
            one(EMAIL, IA5, b"me@example.com"),
            Some("EMAIL=me@example.com"),
        ),
        (one(EMAIL, UTF8, b"a@b.c"), Some("EMAIL=#0c056140622e63")),
        (one(DC, IA5, b"example"), Some("DC=example")),
        (one(DC, UTF8, b"example"), Some("DC=#0c076578616d706c65")),
        (one(C, UTF8, b"GB"), Some("C=#0c024742")),
        (one(C, PRINTABLE, b"gbr"), Some("C=gbr")),
        (one("2.5.4.5", PRINTABLE, b"42"), Some("serialNumber=42")),
        (one("2.5.4.5", UTF8, b"42"), Some("serialNumber=#0c023432")),
        (one(CN, IA5, b"ia5"), Some("CN=#1603696135")),
        (one(CN, 2, &[5]), Some("CN=#020105")),
        (one("1.2.3.4.5", UTF8, b"w1"), Some("1.2.3.4.5=#0c027731")),
        (one("1.2.3.4.5", UTF8, b""), Some("1.2.3.4.5=#0c00")),
        (
            one("2.999.1234567.1", UTF8, b"q"),
            Some("2.999.1234567.1=#0c0171"),
        ),
        (
            one("1.2.840.113549.1.9.7", UTF8, b"a,b"),
            Some("1.2.840.113549.1.9.7=a\\,b"),
        ),
        (one("2.5.4.9", UTF8, b"Main"), Some("street=Main")),
        (one("2.5.4.4", UTF8, b"Doe"), Some("surName=Doe")),
        (one("2.5.4.46", PRINTABLE, b"q"), Some("dnQualifier=q")),
        (
            one("1.3.6.1.4.1.311.60.2.1.3", PRINTABLE, b"GB"),
            Some("jurisdictionOfIncorporationCountryName=GB"),
        ),
        (one("1.2.643.3.131.1.1", 18, b"12"), Some("INN=12")),
        (one(CN, UTF8, b"a\0b"), Some("CN=#0c03610062")),
        (text(&"x".repeat(1500)), None),
        (
            name(&[rdn(&[utf8(CN, "a")]), tlv(0x31, &[]), rdn(&[utf8(O, "b")])]),
            Some("CN=a,O=b"),
        ),
        (text(""), None),
        (one(O, PRINTABLE, b""), None),
        (name(&[]), None),
    ]
}

fn rule(qmp: &mut Qmp, identity: &str) {
    let change = json!({"path": "/objects/az", "property": "identity", "value": identity});
    qmp.ok("qom-set", change);
}

#[test]
fn names_are_spelled_as_qemu_spells_them() {
    if !(has("nbdinfo") && has("qemu-storage-daemon")) {
        return;
    }
    let world = World::new();
    let simple = ["--object", "authz-simple,id=az,identity=nobody"];
    let servers = [
        Daemon::start(&simple),
        Daemon::qsd(&simple).expect("it is there"),
    ];
    let mut servers = servers.map(|it| Served::by(it, &world, json!({"tls-authz": "az"})));
    let mut compared = 0;
    for (subject, wanted) in names() {
        let profile = Profile {
            subject,
            ..Profile::client("")
        };
        let issued = world.client("one", &profile);
        let parsed = Certificate::parse(&issued.der).unwrap();
        let spelled = spell(parsed.subject).ok();
        if wanted.is_some() {
            assert_eq!(spelled.as_deref(), wanted);
        }
        for served in &mut servers {
            // A name without a spelling is admitted by no rule, not even one of an empty name.
            let rules = spelled.clone().unwrap_or_default();
            rule(&mut served.qmp, &rules);
            let admitted = served.admits(&world, "one");
            assert_eq!(
                admitted,
                spelled.is_some(),
                "{spelled:?} {}",
                served.daemon.pid()
            );
            rule(&mut served.qmp, &format!("{rules}x"));
            assert!(!served.admits(&world, "one"), "{spelled:?}");
        }
        compared += usize::from(spelled.is_some());
    }
    assert!(compared >= 25, "{compared}");
}
