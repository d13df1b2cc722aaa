//! Tables and numbers for people.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

/// A table whose columns behind the first `text_columns` are numbers, aligned to the right.
pub(crate) fn table(header: Vec<&str>, text_columns: usize) -> Table {
    let mut table = Table::new();
    let rule = LineStyle::none().fill('─').junction('─');
    table.load_style(TableStyle::new().header_separator(rule)).set_header(header);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((if i == 0 { 0 } else { 1 }, 0));
        if i >= text_columns {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A number with so many decimals, or `-`.
pub(crate) fn decimal(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.decimals$}"))
}

/// A share as a percentage, or `-`.
pub(crate) fn percent(share: Option<f64>, decimals: usize) -> String {
    share.map_or_else(|| "-".into(), |s| format!("{:.decimals$} %", 100.0 * s))
}

/// A count with thousands apart: 25,557,032.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in a unit that suits it.
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..10_240 => format!("{} bytes", grouped(count)),
        10_240..10_485_760 => format!("{:.1} KiB", count as f64 / 1024.0),
        _ => format!("{:.1} MiB", count as f64 / (1024.0 * 1024.0)),
    }
}

/// A name cut to a width. Its end stays, for that is where the names of layers differ.
pub(crate) fn elided(name: &str, width: usize) -> String {
    match name.chars().count().checked_sub(width) {
        None | Some(0) => name.into(),
        Some(excess) => ['…'].into_iter().chain(name.chars().skip(excess + 1)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 25_557_032].map(grouped), ["0", "999", "1,000", "25,557,032"]);
        assert_eq!([12, 320_000, 99_000_000].map(bytes), ["12 bytes", "312.5 KiB", "94.4 MiB"]);
        assert_eq!((percent(Some(0.9196), 2), decimal(None, 1)), ("91.96 %".into(), "-".into()));
    }

    #[test]
    fn long_names_keep_their_end() {
        assert_eq!(
            ["conv", "/l1/ü/conv", "/l1/üx/conv"].map(|n| elided(n, 10)),
            ["conv", "/l1/ü/conv", "…1/üx/conv"]
        );
    }
}
