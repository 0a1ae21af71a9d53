use serde_json::json;

use super::*;

/// What the input leads to: values, and errors without their position.
fn outcomes(bytes: &[u8]) -> Vec<Result<Value, String>> {
    let all = Reader::new().feed(bytes);
    let mut reader = Reader::new();
    let pieces: Vec<_> = bytes
        .iter()
        .flat_map(|byte| reader.feed(&[*byte]))
        .collect();
    assert_eq!(all, pieces, "the same input in pieces");
    let words = |error: ParseError| error.message.replace("JSON parse error, ", "");
    all.into_iter()
        .map(|outcome| outcome.map_err(words))
        .collect()
}

fn errors(bytes: &[u8]) -> Vec<String> {
    outcomes(bytes)
        .into_iter()
        .map(Result::unwrap_err)
        .collect()
}

#[test]
fn values_need_no_newline() {
    let want = [
        Ok(json!({"a": [1, true, null]})),
        Ok(json!([])),
        Ok(json!("x")),
    ];
    assert_eq!(outcomes(br#"{"a":[1,true,null]}[]'x'"#), want);
}

#[test]
fn a_bare_scalar_waits_for_the_next_byte() {
    let mut reader = Reader::new();
    assert_eq!(reader.feed(b"123"), []);
    assert_eq!(reader.feed(b"\r\n"), [Ok(json!(123))]);
    assert_eq!(reader.feed(b"tru"), []);
    assert_eq!(
        reader.finish().unwrap().unwrap_err().to_string(),
        "2:1: JSON parse error, invalid keyword 'tru'"
    );
}

#[test]
fn a_syntax_error_swallows_its_message() {
    let cases: [(&[u8], &str); 12] = [
        (b"{\"a\" 1, \"b\": [{}]}", "expecting ':'"),
        (b"{\"a\": 1,}", "expecting key"),
        (b"{1: 2}", "expecting key"),
        (b"{\"a\": [1,}, \"b\": 3}", "expecting value"),
        (b"[1 2, {}]", "expected ',' or ']'"),
        (b"{\"a\": 1 \"b\"}", "expected ',' or '}'"),
        (b"{\"a\": 1, \"a\": 2}", "duplicate key"),
        (b"{\"a\": tru}", "invalid keyword 'tru'"),
        (b"[1E400]", "number '1E400' is out of range"),
        (b"[\"\\q\", []]", "invalid escape sequence in string"),
        (b"[,]", "expecting value"),
        (b"[1 [2]]", "expected ',' or ']'"),
    ];
    for (bytes, want) in cases {
        let message = String::from_utf8_lossy(bytes);
        let follow_up = [bytes, b"{}"].concat();
        let got = outcomes(&follow_up);
        assert_eq!(got, [Err(want.into()), Ok(json!({}))], "{message}");
    }
}

#[test]
fn marks_outside_messages_are_errors_by_themselves() {
    assert_eq!(errors(b"},:"), ["expecting value"; 3]);
}

#[test]
fn a_damaged_token_ends_its_message() {
    assert_eq!(errors(b"@@ @@"), ["stray '@'"]);
    let expecting = ["expecting value"; 3].map(str::to_owned);
    let with_rest = |stray: &str| [&[stray.to_owned()], &expecting[..]].concat();
    assert_eq!(errors(b"{\"a\": [[@]]}"), with_rest("stray '@'"));
    assert_eq!(errors(b"[[[\"b\tc\"]]]"), with_rest("stray '\"b\t'"));
    assert_eq!(errors(b"[[[01]]]"), with_rest("stray '01'"));
    // What is wrong before it is not told: it is known at the message's end only.
    assert_eq!(errors(b"{{1.x\n"), ["stray '1.x'"]);
}

#[test]
fn the_next_line_is_a_message_of_its_own() {
    for damaged in [
        &b"{\"a\":\"\n"[..],
        b"[[{\"a\": 01\n",
        b"{\"a\" 1, @\r\n",
        b"'\\\n",
    ] {
        let got = outcomes(&[damaged, b"{}"].concat());
        assert!(got[0].is_err(), "{got:?}");
        assert_eq!(got[1..], [Ok(json!({}))], "{}", damaged.escape_ascii());
    }
}

#[test]
fn resync_bytes_clean_the_reader() {
    let want = [Err("stray '\u{fffd}'".into()), Ok(json!({}))];
    assert_eq!(outcomes(b"{\"a\": [\xff{}"), want);
    let want = [Err("stray '\"b\u{1}'".into()), Ok(json!([]))];
    assert_eq!(outcomes(b"{\"a\": \"b\x01[]"), want);
    let want = [Err("stray '\u{fffd}'".into()), Ok(json!(1))];
    assert_eq!(outcomes(b"{{\xff dropped\n1 "), want);
}

#[test]
fn nesting_is_limited() {
    let nested = |depth| [b"[".repeat(depth), b"]".repeat(depth), b"1 ".to_vec()].concat();
    assert!(outcomes(&nested(1024))[0].is_ok());
    let limit = Err("JSON nesting depth limit exceeded".into());
    assert_eq!(outcomes(&nested(1025)), [limit, Ok(json!(1))]);
}

#[test]
fn tokens_are_limited() {
    let mut reader = Reader::new();
    let mut got = reader.feed(b"[");
    got.extend(reader.feed(&b"1,".repeat(crate::wire::MESSAGE_TOKENS_MAX / 2 + 1)));
    got.extend(reader.feed(b"1]2 "));
    assert_eq!(got.len(), 2);
    assert_eq!(
        got[0].as_ref().unwrap_err().to_string(),
        "JSON token count limit exceeded"
    );
    assert_eq!(got[1], Ok(json!(2)));
}

#[test]
fn bytes_are_limited() {
    let mut reader = Reader::new();
    let piece = vec![b'x'; 1 << 20];
    let mut got = reader.feed(b"[[\"");
    for _ in 0..65 {
        got.extend(reader.feed(&piece));
    }
    got.extend(reader.feed(b"\"], \"y\"] 2 "));
    assert_eq!(got.len(), 2);
    assert_eq!(
        got[0].as_ref().unwrap_err().to_string(),
        "JSON token size limit exceeded"
    );
    assert_eq!(got[1], Ok(json!(2)));
}

#[test]
fn positions_count_over_the_connection() {
    let mut reader = Reader::new();
    assert_eq!(reader.feed(b"{}\r\n [\xff").len(), 2);
    let got = reader.feed(b"\n{}  }");
    assert_eq!(
        got[1].as_ref().unwrap_err().to_string(),
        "3:5: JSON parse error, expecting value"
    );
}

#[test]
fn one_value_is_one_value() {
    assert_eq!(parse_one(b" {} ").unwrap(), json!({}));
    assert_eq!(parse_one(b"12").unwrap(), json!(12));
    let error = |text: &[u8]| parse_one(text).unwrap_err().desc;
    assert_eq!(error(b"{} 1"), "Expecting at most one JSON value");
    assert!(error(b"{\"a\": ").ends_with("premature end of input"));
    assert!(error(b"\"a").ends_with("premature end of input"));
    assert!(error(b"").ends_with("premature end of input"));
}
