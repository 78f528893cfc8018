//! Tables, for terminals and for Markdown.

/// Rows of text under a header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(header: [&str; N]) -> Self {
        Self { header: header.map(str::to_owned).into(), rows: Vec::new() }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// Columns as wide as they must be; numbers to the right.
    pub(crate) fn text(&self) -> String {
        let widths = self.widths();
        let line = |cells: &Vec<String>| {
            let padded = cells.iter().enumerate().map(|(column, cell)| {
                let padding = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
                if self.is_numeric(column) { format!("{padding}{cell}") } else { format!("{cell}{padding}") }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let lines: Vec<String> = std::iter::once(&self.header).chain(&self.rows).map(line).collect();
        lines.join("\n")
    }

    pub(crate) fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let rule: Vec<String> = (0..self.header.len())
            .map(|column| if self.is_numeric(column) { "---:".to_owned() } else { "---".to_owned() })
            .collect();
        let rows = self.rows.iter().map(|row| line(row));
        [line(&self.header), line(&rule)].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = std::iter::once(&self.header).chain(&self.rows);
            cells.map(|cells| cells[column].chars().count()).max().unwrap_or(0)
        };
        (0..self.header.len()).map(width).collect()
    }

    /// Whether every cell starts like a number or is empty.
    fn is_numeric(&self, column: usize) -> bool {
        let starts = |row: &Vec<String>| row[column].starts_with(|c: char| c.is_ascii_digit() || c == '-');
        self.rows.iter().any(starts) && self.rows.iter().all(|row| row[column].is_empty() || starts(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["kernel", "us"]);
        table.row(["top_k".into(), "4.1".into()]);
        table.row(["sparse_mla".into(), "17".into()]);
        table.row(["x".into(), String::new()]);
        table
    }

    #[test]
    fn text_is_aligned() {
        assert_eq!(table().text(), "kernel       us\ntop_k       4.1\nsparse_mla   17\nx");
    }

    #[test]
    fn markdown_is_a_table() {
        let expected = "| kernel | us |\n| --- | ---: |\n| top_k | 4.1 |\n| sparse_mla | 17 |\n| x |  |";
        assert_eq!(table().markdown(), expected);
    }
}
