//! Amounts of memory as people write them: `6GiB`, `6G`, `1.5 GiB`, `6442450944`.
//!
//! `K`, `M`, `G`, `T` alone and with `iB` are powers of 1024, with `B` powers of 1000. Refuses
//! anything that a person may have meant differently.

/// The bytes that `text` stands for.
///
/// # Errors
/// Says what was expected, for clap to put beside the flag's name.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim().to_ascii_lowercase());
    let unit_bytes = unit_bytes(&unit)
        .ok_or_else(|| format!("unknown unit {unit:?}: expected bytes, KiB, MiB, GiB or TiB"))?;
    let expected = || "expected a size such as 6GiB, 6G or a number of bytes".to_string();
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(unit_bytes).ok_or("more bytes than 64 bits hold")?,
        Err(_) => {
            let number: f64 = number.parse().map_err(|_| expected())?;
            (number * unit_bytes as f64) as u64
        }
    };
    if bytes == 0 { Err(expected()) } else { Ok(bytes) }
}

/// As [`parse`], and `0`, which switches something off.
///
/// # Errors
/// As [`parse`].
pub fn parse_or_none(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { parse(text) }
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let (prefix, base) = match unit {
        "" | "b" => return Some(1),
        _ if unit.ends_with("ib") => (&unit[..unit.len() - 2], 1024u64),
        _ if unit.ends_with('b') => (&unit[..unit.len() - 1], 1000),
        _ => (unit, 1024),
    };
    let power = ["k", "m", "g", "t"].iter().position(|&known| known == prefix)?;
    Some(base.pow(power as u32 + 1))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_mean_what_their_unit_says() {
        for (text, bytes) in [
            ("1", 1),
            ("512b", 512),
            ("6GiB", 6 << 30),
            ("6G", 6 << 30),
            ("6g", 6 << 30),
            ("6GB", 6_000_000_000),
            ("1.5 MiB", 3 << 19),
            ("2t", 2 << 40),
            ("300MiB", 300 << 20),
            ("8k", 8192),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "0", "-1", "GiB", "6 potatoes", "1.2.3G", "99999999999TiB", "6Gi"] {
            assert!(parse(text).is_err(), "{text}: {:?}", parse(text));
        }
    }
}
