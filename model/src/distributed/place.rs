//! Which rank of how many a process is, as launchers say it.

use crate::error::LaunchError;

/// torchrun holds `MASTER_PORT` itself where this is `True`; the ranks then meet on the port after it.
const AGENT_HOLDS_PORT: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// A process's place among the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `RANK`.
    pub rank: usize,
    /// `WORLD_SIZE`, at least 2.
    pub world_size: usize,
    /// `LOCAL_RANK`: which of its machine's GPUs is the process's; `RANK` where it is not set.
    pub local_rank: usize,
    /// `MASTER_ADDR`: the machine of rank 0.
    pub master: String,
    /// `MASTER_PORT`, on which rank 0 listens; the port after it where torchrun holds that one.
    pub port: u16,
}

impl Place {
    /// What the environment says; none where a process is alone.
    ///
    /// # Errors
    /// Some of the variables are missing, or mean nothing.
    pub fn from_env() -> Result<Option<Self>, LaunchError> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        if given("RANK").is_none() && given("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let needed = |name: &str| given(name).ok_or_else(|| missing(name));
        let rank = number(&needed("RANK")?, "RANK", "a rank, from 0 on")?;
        let world_size = number(&needed("WORLD_SIZE")?, "WORLD_SIZE", "a number of ranks")?;
        if rank >= world_size {
            return Err(LaunchError::Options(format!(
                "RANK is {rank}; expected a rank below WORLD_SIZE, which is {world_size}"
            )));
        }
        if world_size == 1 {
            return Ok(None);
        }
        let local_rank = match given("LOCAL_RANK") {
            Some(value) => number(&value, "LOCAL_RANK", "the number of a GPU")?,
            None => rank,
        };
        let master = needed("MASTER_ADDR")?;
        let port: u16 = number(&needed("MASTER_PORT")?, "MASTER_PORT", "a port")?;
        let held = given(AGENT_HOLDS_PORT).is_some_and(|value| value == "True");
        let port = port.checked_add(u16::from(held)).filter(|&port| port > 0).ok_or_else(|| {
            LaunchError::Options(format!("MASTER_PORT is {port}; expected a port that leaves room for ours"))
        })?;
        Ok(Some(Self { rank, world_size, local_rank, master, port }))
    }

    /// Where rank 0 listens, for people.
    pub(super) fn address(&self) -> String {
        format!("{}:{}", self.master, self.port)
    }
}

fn missing(name: &str) -> LaunchError {
    LaunchError::Options(format!(
        "{name} is not set, though others of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are: a rank of several processes needs all \
         four (and LOCAL_RANK where a machine has several GPUs); unset RANK and WORLD_SIZE to run alone"
    ))
}

fn number<T: std::str::FromStr>(value: &str, name: &str, expected: &str) -> Result<T, LaunchError> {
    value.parse().map_err(|_| LaunchError::Options(format!("{name} is {value:?}; expected {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Place>, String> {
        Place::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
            .map_err(|error| error.to_string())
    }

    const FOUR: [(&str, &str); 4] =
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")];

    #[test]
    fn what_launchers_set_is_read() {
        let place = read(&FOUR).unwrap().unwrap();
        assert_eq!((place.rank, place.world_size, place.local_rank), (1, 2, 1));
        assert_eq!(place.address(), "node0:29500");
        let more = [&FOUR[..], &[("LOCAL_RANK", "0"), (AGENT_HOLDS_PORT, "True")]].concat();
        let place = read(&more).unwrap().unwrap();
        assert_eq!((place.local_rank, place.port), (0, 29501));
        assert_eq!(read(&[("MASTER_ADDR", "node0")]), Ok(None));
        assert_eq!(read(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(None));
    }

    #[test]
    fn what_is_missing_or_means_nothing_is_named() {
        for (left_out, _) in FOUR {
            let others: Vec<_> = FOUR.into_iter().filter(|(name, _)| *name != left_out).collect();
            let error = read(&others).unwrap_err();
            assert!(error.starts_with(&format!("{left_out} is not set")), "{error}");
        }
        for (name, value, words) in [
            ("RANK", "2", "expected a rank below WORLD_SIZE, which is 2"),
            ("RANK", "one", "RANK is \"one\"; expected a rank"),
            ("WORLD_SIZE", "-1", "expected a number of ranks"),
            ("MASTER_PORT", "99999", "expected a port"),
            ("MASTER_PORT", "0", "expected a port"),
        ] {
            let wrong: Vec<_> = FOUR.iter().map(|&(n, v)| (n, if n == name { value } else { v })).collect();
            let error = read(&wrong).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
