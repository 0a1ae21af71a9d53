//! What `object-add tls-creds-x509` says of a directory, beside what qemu-storage-daemon says.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::pki::{Issued, Profile, directory};
use super::support::{Daemon, Qmp, has, with};

/// Directories, each with one thing wrong, or nothing.
fn directories(root: &Path) -> Vec<String> {
    let authority = Issued::root(&Profile::authority("authority"));
    let other = Issued::root(&Profile::authority("other"));
    // Another key under the same name.
    let impostor = Issued::root(&Profile::authority("authority"));
    let mut names = Vec::new();
    let mut make = |name: &str, authority: &Issued, own: &Issued| {
        directory(&root.join(name), authority, Some(("server", own)));
        names.push(name.to_owned());
    };
    let leaf = Profile::server();
    let leaves: Vec<(&str, Profile)> = vec![
        ("good", leaf.clone()),
        ("expired", leaf.clone().expired()),
        (
            "future",
            Profile {
                from: "400101000000Z",
                ..leaf.clone()
            },
        ),
        (
            "ca-as-leaf",
            Profile {
                is_ca: Some(true),
                ..leaf.clone()
            },
        ),
        (
            "no-constraints",
            Profile {
                is_ca: None,
                ..leaf.clone()
            },
        ),
        (
            "no-usage",
            Profile {
                usage: None,
                ..leaf.clone()
            },
        ),
        (
            "encipherment-only",
            Profile {
                usage: Some((0x20, true)),
                ..leaf.clone()
            },
        ),
        (
            "encipherment-hint",
            Profile {
                usage: Some((0x20, false)),
                ..leaf.clone()
            },
        ),
        (
            "client-hint",
            Profile {
                purpose: Some((2, false)),
                ..leaf.clone()
            },
        ),
        (
            "client-only",
            Profile {
                purpose: Some((2, true)),
                ..leaf.clone()
            },
        ),
        (
            "no-purpose",
            Profile {
                purpose: None,
                ..leaf.clone()
            },
        ),
    ];
    for (name, profile) in leaves {
        make(name, &authority, &authority.issue(&profile));
    }
    let ca = Profile::authority("authority");
    let authorities: Vec<(&str, Profile)> = vec![
        ("ca-expired", ca.clone().expired()),
        (
            "ca-future",
            Profile {
                from: "400101000000Z",
                ..ca.clone()
            },
        ),
        (
            "ca-no-constraints",
            Profile {
                is_ca: None,
                ..ca.clone()
            },
        ),
        (
            "ca-is-none",
            Profile {
                is_ca: Some(false),
                ..ca.clone()
            },
        ),
        (
            "ca-no-usage",
            Profile {
                usage: None,
                ..ca.clone()
            },
        ),
        (
            "ca-signs-no-certificates",
            Profile {
                usage: Some((0x02, true)),
                ..ca.clone()
            },
        ),
        (
            "ca-signs-no-certificates-hint",
            Profile {
                usage: Some((0x80, false)),
                ..ca
            },
        ),
    ];
    for (name, profile) in authorities {
        let authority = Issued::root(&profile);
        make(name, &authority, &authority.issue(&leaf));
    }
    let own = authority.issue(&leaf);
    make("other-ca", &other, &own);
    make("impostor", &impostor, &own);
    for name in [
        "no-cert",
        "no-key",
        "no-ca",
        "no-own",
        "junk-ca",
        "junk-cert",
        "junk-key",
        "junk-crl",
        "wrong-key",
        "empty-ca",
        "chain",
    ] {
        make(name, &authority, &own);
    }
    let file = |path: &str| root.join(path);
    for path in [
        "no-cert/server-cert.pem",
        "no-key/server-key.pem",
        "no-ca/ca-cert.pem",
        "no-own/server-cert.pem",
        "no-own/server-key.pem",
    ] {
        fs::remove_file(file(path)).unwrap();
    }
    for path in [
        "junk-ca/ca-cert.pem",
        "junk-cert/server-cert.pem",
        "junk-key/server-key.pem",
        "junk-crl/ca-crl.pem",
    ] {
        fs::write(file(path), "junk").unwrap();
    }
    fs::write(file("empty-ca/ca-cert.pem"), "").unwrap();
    fs::write(file("wrong-key/server-key.pem"), other.key.serialize_pem()).unwrap();
    let chain = format!("{}{}", own.pem(), authority.pem());
    fs::write(file("chain/server-cert.pem"), chain).unwrap();
    names
}

fn answers(qmp: &mut Qmp, objects: &[Value]) -> Vec<Option<String>> {
    let add = |(number, object): (usize, &Value)| {
        let id = json!({"id": format!("t{number}")});
        let answer = qmp.execute("object-add", with(object.clone(), &id));
        answer["error"]["desc"].as_str().map(str::to_owned)
    };
    objects.iter().enumerate().map(add).collect()
}

#[test]
fn mistakes_have_qemus_words() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let names = directories(folder.path());
    let object = |name: &str| {
        json!({"qom-type": "tls-creds-x509", "dir": folder.path().join(name),
            "endpoint": "server"})
    };
    let mut objects: Vec<Value> = names.iter().map(|name| object(name)).collect();
    let more = [
        ("junk-ca", json!({"sanity-check": false})),
        ("junk-cert", json!({"sanity-check": false})),
        ("expired", json!({"sanity-check": false})),
        ("no-own", json!({"endpoint": "client"})),
        ("no-ca", json!({"endpoint": "client"})),
        ("no-ca", json!({"verify-peer": false})),
        ("good", json!({"endpoint": "both"})),
        ("good", json!({"verify-peer": "on"})),
        ("good", json!({"priority": "NORMAL:-VERS-TLS1.3"})),
        ("good", json!({"passwordid": "nosuch"})),
        ("good", json!({"passwordid": "az"})),
        ("good", json!({"dir": "/nonexistent"})),
    ];
    objects.extend(more.map(|(name, more)| with(object(name), &more)));
    objects.push(json!({"qom-type": "tls-creds-x509", "endpoint": "server"}));
    let az = ["--object", "authz-simple,id=az,identity=x"];
    let [ours, theirs] = [Daemon::start(&az), Daemon::qsd(&az).unwrap()]
        .map(|daemon| answers(&mut daemon.qmp(), &objects));
    for ((ours, theirs), object) in ours.iter().zip(&theirs).zip(&objects) {
        assert_eq!(ours, theirs, "{object}");
    }
    let refused = ours.iter().flatten().count();
    assert!(refused > 25 && refused < objects.len() - 10, "{refused}");
}

#[test]
fn keys_may_be_encrypted() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Issued::root(&Profile::authority("authority"));
    let own = authority.issue(&Profile::server());
    let object = |name: &str, more: Value| {
        let object = json!({"qom-type": "tls-creds-x509", "endpoint": "server",
            "dir": folder.path().join(name)});
        with(object, &more)
    };
    let mut objects = Vec::new();
    for cipher in ["aes-256-cbc", "aes-128-cbc", "des3"] {
        directory(
            &folder.path().join(cipher),
            &authority,
            Some(("server", &own)),
        );
        let key = folder.path().join(cipher).join("server-key.pem");
        let clear = folder.path().join("clear");
        fs::rename(&key, &clear).unwrap();
        let done = std::process::Command::new("openssl")
            .args(["pkcs8", "-topk8", "-v2", cipher, "-passout", "pass:secret"])
            .args([
                "-in".as_ref(),
                clear.as_os_str(),
                "-out".as_ref(),
                key.as_os_str(),
            ])
            .output();
        assert!(done.unwrap().status.success());
        for more in [
            json!({}),
            json!({"passwordid": "wrong"}),
            json!({"passwordid": "right"}),
        ] {
            objects.push(object(cipher, more));
        }
    }
    let secrets = [
        "--object",
        "secret,id=right,data=secret",
        "--object",
        "secret,id=wrong,data=other",
    ];
    let daemon = Daemon::start(&secrets);
    let ours = answers(&mut daemon.qmp(), &objects);
    for said in ours.chunks(3) {
        let refused = |said: &Option<String>| {
            said.as_ref()
                .is_some_and(|it| it.ends_with("Decryption has failed."))
        };
        assert!(
            refused(&said[0]) && refused(&said[1]) && said[2].is_none(),
            "{said:?}"
        );
    }
    if let Some(theirs) = Daemon::qsd(&secrets) {
        assert_eq!(ours, answers(&mut theirs.qmp(), &objects));
    }
}

#[test]
fn a_key_in_the_traditional_encryption_names_the_command_that_converts_it() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Issued::root(&Profile::authority("authority"));
    let own = authority.issue(&Profile::server());
    directory(folder.path(), &authority, Some(("server", &own)));
    let key = folder.path().join("server-key.pem");
    let (clear, old) = (folder.path().join("clear"), folder.path().join("old"));
    fs::rename(&key, &clear).unwrap();
    let openssl = |args: &[&std::ffi::OsStr]| {
        let done = std::process::Command::new("openssl").args(args).output();
        assert!(done.unwrap().status.success(), "{args:?}");
    };
    let words = |text: &'static str| text.split(' ').map(std::ffi::OsStr::new);
    let (from, to) = (clear.as_os_str(), old.as_os_str());
    let traditional = words("pkey -traditional -aes256 -passout pass:secret -in");
    openssl(
        &traditional
            .chain([from, "-out".as_ref(), to])
            .collect::<Vec<_>>(),
    );
    fs::copy(&old, &key).unwrap();
    assert!(
        fs::read_to_string(&key)
            .unwrap()
            .contains("Proc-Type: 4,ENCRYPTED")
    );
    let object = |more: Value| {
        let object = json!({"qom-type": "tls-creds-x509", "endpoint": "server",
            "dir": folder.path()});
        with(object, &more)
    };
    let objects = [object(json!({})), object(json!({"passwordid": "s"}))];
    let daemon = Daemon::start(&["--object", "secret,id=s,data=secret"]);
    let mut qmp = daemon.qmp();
    for said in answers(&mut qmp, &objects) {
        let said = said.unwrap();
        assert!(
            said.contains("openssl pkcs8 -topk8 -in OLD.pem -out NEW.pem"),
            "{said}"
        );
    }
    let convert = words("pkcs8 -topk8 -passin pass:secret -passout pass:secret -in");
    let to = ["-out".as_ref(), key.as_os_str()];
    openssl(
        &convert
            .chain([old.as_os_str()])
            .chain(to)
            .collect::<Vec<_>>(),
    );
    assert_eq!(answers(&mut qmp, &objects[1..]), [None]);
}

#[test]
fn several_identities_and_what_is_missing_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Issued::root(&Profile::authority("authority"));
    let own = authority.issue(&Profile::server());
    directory(folder.path(), &authority, None);
    let object = json!({"qom-type": "tls-creds-x509", "endpoint": "server",
        "dir": folder.path()});
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let mut add = || answers(&mut qmp, std::slice::from_ref(&object)).remove(0);
    let path = |name: &str| folder.path().join(name);
    fs::write(path("server-cert-0.pem"), own.pem()).unwrap();
    let missing = add().unwrap();
    assert!(missing.contains("without corresponding key"), "{missing}");
    fs::write(path("server-key-0.pem"), own.key.serialize_pem()).unwrap();
    assert_eq!(add(), None);
}

#[test]
fn anonymous_credentials_are_refused_with_a_sentence() {
    let daemon = Daemon::start(&[]);
    let anonymous = json!({"qom-type": "tls-creds-anon", "id": "t", "endpoint": "server"});
    let said = daemon.qmp().err("object-add", anonymous);
    assert!(said.contains("tls-creds-x509"), "{said}");
}
