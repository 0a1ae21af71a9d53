//! A certificate authority in DER, which can make what others refuse to.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{KeyPair, PublicKeyData, SigningKey};

/// ecdsa-with-SHA256.
const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 6;
pub(crate) const UTF8: u8 = 12;

pub(crate) fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let len = content.len();
    let head = match len {
        0..0x80 => vec![tag, len as u8],
        0x80..0x100 => vec![tag, 0x81, len as u8],
        _ => vec![tag, 0x82, (len >> 8) as u8, len as u8],
    };
    [head, content].concat()
}

/// An object identifier from its digits.
pub(crate) fn oid(text: &str) -> Vec<u8> {
    let numbers: Vec<u64> = text.split('.').map(|it| it.parse().unwrap()).collect();
    let first = numbers[0] * 40 + numbers[1];
    let mut out = Vec::new();
    for number in [first].into_iter().chain(numbers[2..].iter().copied()) {
        let mut digits = vec![(number & 0x7f) as u8];
        let mut rest = number >> 7;
        while rest > 0 {
            digits.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        out.extend(digits.iter().rev());
    }
    tlv(OID, &[&out])
}

/// An attribute of a name.
pub(crate) fn attribute(kind: &str, tag: u8, value: &[u8]) -> Vec<u8> {
    tlv(SEQUENCE, &[&oid(kind), &tlv(tag, &[value])])
}

/// A part of a name, of one attribute or several.
pub(crate) fn rdn(attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut attributes = attributes.to_vec();
    attributes.sort();
    tlv(SET, &[&attributes.concat()])
}

/// A whole name.
pub(crate) fn name(rdns: &[Vec<u8>]) -> Vec<u8> {
    tlv(SEQUENCE, &[&rdns.concat()])
}

/// The name with only this common name.
pub(crate) fn common(cn: &str) -> Vec<u8> {
    name(&[rdn(&[attribute("2.5.4.3", UTF8, cn.as_bytes())])])
}

/// What a certificate says.
#[derive(Clone)]
pub(crate) struct Profile {
    pub(crate) subject: Vec<u8>,
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
    /// Names of hosts.
    pub(crate) hosts: Vec<&'static str>,
    /// Other names: of workloads, for example.
    pub(crate) uris: Vec<&'static str>,
    /// `None`: the extension is missing.
    pub(crate) is_ca: Option<bool>,
    /// Bits of the key usage, and whether it is critical.
    pub(crate) usage: Option<(u8, bool)>,
    /// Last number of a purpose (1 is servers, 2 is clients), and whether it is critical.
    pub(crate) purpose: Option<(u8, bool)>,
}

impl Profile {
    pub(crate) fn leaf(cn: &str, purpose: u8) -> Self {
        Self {
            subject: common(cn),
            from: "200101000000Z",
            to: "491231000000Z",
            hosts: Vec::new(),
            uris: Vec::new(),
            is_ca: Some(false),
            // QEMU 10 wants key encipherment, 11 does not.
            usage: Some((0xa0, true)),
            purpose: Some((purpose, false)),
        }
    }

    pub(crate) fn server() -> Self {
        Self {
            hosts: vec!["localhost"],
            ..Self::leaf("localhost", 1)
        }
    }

    pub(crate) fn client(cn: &str) -> Self {
        Self::leaf(cn, 2)
    }

    pub(crate) fn authority(cn: &str) -> Self {
        Self {
            is_ca: Some(true),
            usage: Some((0x06, true)),
            purpose: None,
            ..Self::leaf(cn, 0)
        }
    }

    pub(crate) fn expired(self) -> Self {
        Self {
            to: "210101000000Z",
            ..self
        }
    }

    fn extensions(&self) -> Vec<u8> {
        let extension = |id: &str, critical: bool, value: Vec<u8>| {
            let critical: &[u8] = if critical { &[1, 1, 0xff] } else { &[] };
            tlv(SEQUENCE, &[&oid(id), critical, &tlv(4, &[&value])])
        };
        let mut all = Vec::new();
        if let Some(is_ca) = self.is_ca {
            let flag: &[u8] = if is_ca { &[1, 1, 0xff] } else { &[] };
            all.extend(extension("2.5.29.19", true, tlv(SEQUENCE, &[flag])));
        }
        if let Some((bits, critical)) = self.usage {
            let unused = bits.trailing_zeros() as u8;
            all.extend(extension("2.5.29.15", critical, tlv(3, &[&[unused, bits]])));
        }
        if let Some((purpose, critical)) = self.purpose {
            let purpose = oid(&format!("1.3.6.1.5.5.7.3.{purpose}"));
            all.extend(extension("2.5.29.37", critical, tlv(SEQUENCE, &[&purpose])));
        }
        let hosts = self.hosts.iter().map(|host| tlv(0x82, &[host.as_bytes()]));
        let uris = self.uris.iter().map(|uri| tlv(0x86, &[uri.as_bytes()]));
        let names: Vec<_> = hosts.chain(uris).collect();
        if !names.is_empty() {
            let names = tlv(SEQUENCE, &[&names.concat()]);
            all.extend(extension("2.5.29.17", false, names));
        }
        all
    }
}

/// A certificate and its key.
pub(crate) struct Issued {
    pub(crate) der: Vec<u8>,
    pub(crate) key: KeyPair,
    pub(crate) serial: u32,
    subject: Vec<u8>,
}

fn algorithm() -> Vec<u8> {
    tlv(SEQUENCE, &[&tlv(OID, &[ECDSA])])
}

fn signed(content: &[u8], key: &KeyPair) -> Vec<u8> {
    let signature = key.sign(content).unwrap();
    tlv(
        SEQUENCE,
        &[content, &algorithm(), &tlv(3, &[&[0], &signature])],
    )
}

fn number(value: u32) -> Vec<u8> {
    tlv(2, &[&[0x01], &value.to_be_bytes()])
}

impl Issued {
    /// Signed with its own key.
    pub(crate) fn root(profile: &Profile) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = profile.subject.clone();
        let (der, serial) = certificate(profile, &issuer, &key, &key);
        Self {
            der,
            key,
            serial,
            subject: issuer,
        }
    }

    pub(crate) fn issue(&self, profile: &Profile) -> Self {
        let key = KeyPair::generate().unwrap();
        let (der, serial) = certificate(profile, &self.subject, &key, &self.key);
        Self {
            der,
            key,
            serial,
            subject: profile.subject.clone(),
        }
    }

    pub(crate) fn pem(&self) -> String {
        pem("CERTIFICATE", &self.der)
    }

    /// A list of revoked certificates.
    pub(crate) fn revoke(&self, serials: &[u32], until: &str) -> String {
        let (now, until) = (tlv(23, &[b"200101000000Z"]), tlv(23, &[until.as_bytes()]));
        let entries = serials
            .iter()
            .map(|serial| tlv(SEQUENCE, &[&number(*serial), &now]));
        let entries = tlv(SEQUENCE, &[&entries.collect::<Vec<_>>().concat()]);
        let numbered = tlv(SEQUENCE, &[&oid("2.5.29.20"), &tlv(4, &[&number(1)])]);
        let extensions = tlv(0xa0, &[&tlv(SEQUENCE, &[&numbered])]);
        let content = tlv(
            SEQUENCE,
            &[
                &tlv(2, &[&[1]]),
                &algorithm(),
                &self.subject,
                &now,
                &until,
                &entries,
                &extensions,
            ],
        );
        pem("X509 CRL", &signed(&content, &self.key))
    }
}

fn certificate(
    profile: &Profile,
    issuer: &[u8],
    own: &KeyPair,
    issuers: &KeyPair,
) -> (Vec<u8>, u32) {
    static SERIAL: AtomicU32 = AtomicU32::new(1);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let time = |text: &str| tlv(23, &[text.as_bytes()]);
    let extensions = tlv(0xa3, &[&tlv(SEQUENCE, &[&profile.extensions()])]);
    let content = tlv(
        SEQUENCE,
        &[
            &tlv(0xa0, &[&tlv(2, &[&[2]])]),
            &number(serial),
            &algorithm(),
            issuer,
            &tlv(SEQUENCE, &[&time(profile.from), &time(profile.to)]),
            &profile.subject,
            &own.subject_public_key_info(),
            &extensions,
        ],
    );
    (signed(&content, issuers), serial)
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let digits = STANDARD.encode(der);
    let lines: Vec<_> = digits.as_bytes().chunks(64).collect();
    let lines: Vec<_> = lines
        .iter()
        .map(|it| std::str::from_utf8(it).unwrap())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

/// Writes a directory of credentials; what is `None` is left out.
pub(crate) fn directory(path: &Path, authority: &Issued, own: Option<(&str, &Issued)>) {
    fs::create_dir_all(path).unwrap();
    fs::write(path.join("ca-cert.pem"), authority.pem()).unwrap();
    // Under both names: QEMU says endpoint, libnbd says client.
    if let Some((endpoint, own)) = own {
        fs::write(path.join(format!("{endpoint}-cert.pem")), own.pem()).unwrap();
        let key = own.key.serialize_pem();
        fs::write(path.join(format!("{endpoint}-key.pem")), key).unwrap();
    }
}
