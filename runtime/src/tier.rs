//! Which tier of instructions code is generated for.

use qcc_codegen::{TIERS, Tier};

/// The environment variable that caps the tier.
pub const TIER_VARIABLE: &str = "QCC_ISA";

/// A tier that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TierError {
    /// No tier has this name.
    #[error("there is no tier `{name}` (from {origin}); this CPU has {}", list(.available))]
    Unknown {
        /// The name.
        name: String,
        /// Where it was given.
        origin: &'static str,
        /// Names of the tiers that this CPU has, the best first.
        available: Vec<&'static str>,
    },
    /// This CPU lacks the tier's instructions.
    #[error("this CPU cannot run tier `{name}` (from {origin}); it has {}", list(.available))]
    Unavailable {
        /// The tier.
        name: String,
        /// Where it was given.
        origin: &'static str,
        /// Names of the tiers that this CPU has, the best first.
        available: Vec<&'static str>,
    },
    /// Not even the last tier can run.
    #[error("this CPU is below x86-64-v2 (SSE4.2 and POPCNT), the least that qcc generates code for")]
    None,
}

fn list(names: &[&'static str]) -> String {
    names.join(", ")
}

/// The best tier of this CPU that is not above the one asked for, nor above the one in [`TIER_VARIABLE`].
///
/// # Errors
/// Where a name is none, or of a tier that this CPU cannot run.
pub fn choose_tier(asked: Option<&str>) -> Result<&'static Tier, TierError> {
    let variable = std::env::var(TIER_VARIABLE).ok().filter(|v| !v.is_empty());
    choose(&[(asked, "the option"), (variable.as_deref(), TIER_VARIABLE)], &Tier::available())
}

fn choose(
    caps: &[(Option<&str>, &'static str)],
    available: &[&'static Tier],
) -> Result<&'static Tier, TierError> {
    let names = || available.iter().map(|t| t.name).collect();
    // TIERS is best first: the larger index is the lower cap.
    let mut lowest = 0;
    for &(name, origin) in caps {
        let Some(name) = name else { continue };
        let index = TIERS.iter().position(|t| t.name == name).ok_or_else(|| TierError::Unknown {
            name: name.into(),
            origin,
            available: names(),
        })?;
        if !available.iter().any(|t| t.name == name) {
            return Err(TierError::Unavailable { name: name.into(), origin, available: names() });
        }
        lowest = lowest.max(index);
    }
    let fits = |t: &&&'static Tier| TIERS.iter().position(|x| x.name == t.name).is_some_and(|i| i >= lowest);
    available.iter().find(fits).copied().ok_or(TierError::None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers(names: &[&str]) -> Vec<&'static Tier> {
        names.iter().map(|n| Tier::from_name(n).unwrap()).collect()
    }

    #[test]
    fn the_lower_of_both_caps_counts() {
        let have = tiers(&["avx512vnni", "avx2", "x86-64-v2"]);
        let chosen = |a, b| choose(&[(a, "the option"), (b, TIER_VARIABLE)], &have).map(|t| t.name);
        assert_eq!(chosen(None, None), Ok("avx512vnni"));
        assert_eq!(chosen(Some("avx2"), None), Ok("avx2"));
        assert_eq!(chosen(Some("avx2"), Some("x86-64-v2")), Ok("x86-64-v2"));
        assert_eq!(chosen(Some("x86-64-v2"), Some("avx2")), Ok("x86-64-v2"));
    }

    #[test]
    fn errors_list_what_there_is() {
        let have = tiers(&["avx2", "x86-64-v2"]);
        let refused = |name| choose(&[(Some(name), "the option")], &have).unwrap_err().to_string();
        assert_eq!(
            refused("avx9"),
            "there is no tier `avx9` (from the option); this CPU has avx2, x86-64-v2"
        );
        assert!(refused("avx512vnni").contains("cannot run tier `avx512vnni`"));
        assert_eq!(choose(&[], &[]), Err(TierError::None));
    }
}
