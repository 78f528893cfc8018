//! Tables for the terminal.

/// Rows of words: the first columns are text, the others numbers.
pub(in crate::cli) struct Table {
    texts: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table whose first `texts` columns are text.
    pub(in crate::cli) fn new<const N: usize>(texts: usize, head: [&str; N]) -> Self {
        Self { texts, rows: vec![head.map(str::to_owned).to_vec()] }
    }

    pub(in crate::cli) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// Its lines, each after `indent`.
    pub(in crate::cli) fn text(&self, indent: &str) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if column < self.texts { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            text.push_str(&format!("{indent}{}\n", line.trim_end()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_to_the_left_and_numbers_to_the_right() {
        let mut table = Table::new(1, ["kernel", "us"]);
        table.row(["top_k".into(), "1.5".into()]);
        table.row(["a".into(), "1234.5".into()]);
        assert_eq!(table.text("  "), "  kernel      us\n  top_k      1.5\n  a       1234.5\n");
    }
}
