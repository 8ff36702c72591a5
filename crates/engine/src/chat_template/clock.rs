//! The date, for templates that state it: Python's `strftime` in UTC.
//!
//! UTC because the engine reads no environment and so knows no time zone. The fields that templates
//! use are here; another one is an error, not a literal.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `time` in UTC, written by `format`.
///
/// # Errors
/// A field other than `%Y %y %m %d %e %B %b %A %a %H %I %M %S %p %j %%`, or a time before 1970.
pub fn strftime(format: &str, time: SystemTime) -> Result<String, String> {
    let seconds = time.duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?.as_secs();
    let date = Date::of(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month = MONTHS[date.month as usize - 1];
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let field = chars.next();
        text.push_str(&match field {
            Some('Y') => date.year.to_string(),
            Some('y') => format!("{:02}", date.year % 100),
            Some('m') => format!("{:02}", date.month),
            Some('d') => format!("{:02}", date.day),
            Some('e') => format!("{:2}", date.day),
            Some('B') => month.into(),
            Some('b') => month[..3].into(),
            Some('A') => date.weekday.into(),
            Some('a') => date.weekday[..3].into(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('j') => format!("{:03}", date.day_of_year),
            Some('%') => "%".into(),
            other => return Err(format!("strftime: unknown field {other:?} in {format:?}")),
        });
    }
    Ok(text)
}

struct Date {
    year: u64,
    month: u64,       // from 1
    day: u64,         // from 1
    day_of_year: u64, // from 1
    weekday: &'static str,
}

impl Date {
    /// The Gregorian date, `days` after 1 January 1970, a Thursday.
    fn of(days: u64) -> Self {
        let weekday = WEEKDAYS[(days % 7) as usize];
        let (mut year, mut left) = (1970, days);
        while left >= year_days(year) {
            left -= year_days(year);
            year += 1;
        }
        let day_of_year = left + 1;
        let february = if year_days(year) == 366 { 29 } else { 28 };
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        Self { year, month, day: left + 1, day_of_year, weekday }
    }
}

fn year_days(year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    if leap { 366 } else { 365 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn known_moments_read_as_date_writes_them() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(at(951_782_400, "%Y-%m-%d %a %b %j"), "2000-02-29 Tue Feb 060");
        assert_eq!(at(1_709_251_199, "%y%m%d %I:%M %p"), "240229 11:59 PM");
        assert_eq!(at(4_107_542_400, "%Y-%m-%d %e%%"), "2100-03-01  1%");
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        assert!(strftime("%Q", UNIX_EPOCH).unwrap_err().contains("'Q'"));
        assert!(strftime("50%", UNIX_EPOCH).is_err());
    }
}
