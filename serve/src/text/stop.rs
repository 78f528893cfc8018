//! Stop strings: found across any split of the text, and never shown before it is certain that they are none.

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stopped {
    /// Text that can be shown now.
    pub text: String,
    /// The stop string that ended the generation, as an index into the list given.
    pub matched: Option<usize>,
}

/// Looks for stop strings in a stream of text.
///
/// The one that *ends* first wins, and among those that end together the longest, so that the outcome does
/// not depend on how the text was cut into pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// Text held back: the longest suffix of what came that is the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// A matcher for `stops` (none may be empty); with `include` the stop string is part of the text shown.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece. Nothing may be pushed after a match.
    pub fn push(&mut self, piece: &str) -> Stopped {
        if self.stops.is_empty() {
            return Stopped { text: piece.to_owned(), matched: None };
        }
        self.held.push_str(piece);
        if let Some((start, end, matched)) = self.first_match() {
            self.held.truncate(if self.include { end } else { start });
            return Stopped { text: std::mem::take(&mut self.held), matched: Some(matched) };
        }
        let keep = self.held.len() - self.undecided();
        let rest = self.held.split_off(keep);
        Stopped { text: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// The text ended: what was held back was no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start, end and index of the match that ends first, the longest of those.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| {
                self.held.find(stop.as_str()).map(|start| (start, start + stop.len(), index))
            })
            .min_by_key(|&(start, end, _)| (end, start))
    }

    /// Length in bytes of the longest suffix of `held` that is a proper prefix of some stop string.
    fn undecided(&self) -> usize {
        let suffixes = self.held.char_indices().map(|(start, _)| &self.held[start..]);
        suffixes
            .filter(|suffix| self.stops.iter().any(|stop| stop.starts_with(suffix)))
            .map(str::len)
            .next()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|&s| s.to_owned()).collect(), include);
        let mut text = String::new();
        for piece in pieces {
            let stopped = matcher.push(piece);
            text.push_str(&stopped.text);
            if stopped.matched.is_some() {
                return (text, stopped.matched);
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    /// The rule itself, read off the whole text character by character.
    fn oracle(stops: &[&str], include: bool, text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let hit = (0..stops.len())
                .filter(|&i| text[..end].ends_with(stops[i]))
                .max_by_key(|&i| (stops[i].len(), usize::MAX - i));
            if let Some(i) = hit {
                let cut = if include { end } else { end - stops[i].len() };
                return (text[..cut].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    const CASES: &[(&[&str], &str)] = &[
        (&["\n\n"], "one\ntwo\n\nthree"),
        (&["aab"], "aaaaab!"),
        (&["abc", "b"], "xxabc"),
        (&["abcd", "bc", "cd"], "zabcd"),
        (&["STOP", "STOPPED"], "it STOPPED"),
        (&["日本", "🙂x"], "今日は日曜🙂日本語"),
        (&["no such"], "no suc"),
        (&["</s>"], "<</s</s>"),
        (&["aa", "aa"], "baac"),
    ];

    #[test]
    fn every_split_in_three_equals_the_rule() {
        for &(stops, text) in CASES {
            let cuts: Vec<usize> = (0..=text.len()).filter(|&i| text.is_char_boundary(i)).collect();
            for include in [false, true] {
                let want = oracle(stops, include, text);
                for &i in &cuts {
                    for &j in cuts.iter().filter(|&&j| j >= i) {
                        let got = run(stops, include, &[&text[..i], &text[i..j], &text[j..]]);
                        assert_eq!(got, want, "{stops:?} {text:?} at {i}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_chunk_size_equals_the_rule() {
        for &(stops, text) in CASES {
            let chars: Vec<char> = text.chars().collect();
            for size in [1, 2, 3, 5, 7, 11] {
                let pieces: Vec<String> = chars.chunks(size).map(|chunk| chunk.iter().collect()).collect();
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                assert_eq!(run(stops, false, &pieces), oracle(stops, false, text), "{stops:?} {size}");
            }
        }
    }

    #[test]
    fn nothing_that_could_be_a_stop_string_is_shown_early() {
        let mut matcher = StopMatcher::new(vec!["<end>".into()], false);
        let shown: Vec<String> = "a<e<end".chars().map(|c| matcher.push(&c.to_string()).text).collect();
        assert_eq!(shown, ["a", "", "", "<e", "", "", ""]);
        assert_eq!(matcher.finish(), "<end");
    }
}
