//! Which namespaces and accounts are served: as Citadel 1.4 chose, and each account for itself.

use std::collections::BTreeSet;

/// The label of a namespace that outweighs the other one: `true` or `false`.
pub const OVERRIDE: &str = "ca.istio.io/override";
/// The label of a namespace that names the namespace of its CA.
pub const ENVIRONMENT: &str = "ca.istio.io/env";
/// The label or annotation of an account: `true` or `false`.
pub const DELIVER: &str = "mica.dev/deliver";

/// What was set for all namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Only these, whatever they say of themselves.
    pub watched: Option<BTreeSet<String>>,
    /// Those that say nothing.
    pub by_default: bool,
    /// The CA's own namespace, by which namespaces name it.
    pub own: String,
}

/// What a namespace says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Labels<'a> {
    /// Of [`OVERRIDE`].
    pub overriding: Option<&'a str>,
    /// Of [`ENVIRONMENT`].
    pub environment: Option<&'a str>,
    /// It is being deleted.
    pub is_ending: bool,
}

/// What becomes of a namespace, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Its accounts get secrets, and it gets the roots.
    Served,
    /// It is not among those that are watched.
    Unwatched,
    /// Its label says so.
    Excluded,
    /// Its label names another CA.
    Another,
    /// It says nothing, and such are left out. Its accounts may ask for themselves.
    Unasked,
    /// It is being deleted: nothing can be made in it.
    Ending,
}

impl Choice {
    /// All that a namespace that is watched can get.
    pub const WATCHED: [Self; 5] = [Self::Served, Self::Excluded, Self::Another, Self::Unasked, Self::Ending];

    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Unwatched => "unwatched",
            Self::Excluded => "excluded",
            Self::Another => "another",
            Self::Unasked => "unasked",
            Self::Ending => "ending",
        }
    }

    /// Whether the namespace gets the roots.
    pub fn is_served(self) -> bool {
        self == Self::Served
    }

    /// Whether an account in it gets a secret. Whoever labels the namespace decides; what an account says for itself
    /// counts within that.
    pub fn serves(self, deliver: Option<bool>) -> bool {
        match self {
            Self::Served => deliver != Some(false),
            Self::Unasked => deliver == Some(true),
            Self::Unwatched | Self::Excluded | Self::Another | Self::Ending => false,
        }
    }
}

impl Rules {
    /// What becomes of a namespace.
    pub fn choose(&self, name: &str, labels: &Labels<'_>) -> Choice {
        if self.watched.as_ref().is_some_and(|watched| !watched.contains(name)) {
            return Choice::Unwatched;
        }
        if labels.is_ending {
            return Choice::Ending;
        }
        match (labels.overriding, labels.environment) {
            (Some("true"), _) => Choice::Served,
            (Some("false"), _) => Choice::Excluded,
            // Any other override is none.
            (_, Some(ca)) if ca == self.own => Choice::Served,
            (_, Some(_)) => Choice::Another,
            (_, None) if self.by_default => Choice::Served,
            (_, None) => Choice::Unasked,
        }
    }
}

/// What an account says by [`DELIVER`], as a label or as an annotation. A `false` in either place counts; what is neither
/// word says nothing.
pub fn deliver(label: Option<&str>, annotation: Option<&str>) -> Option<bool> {
    let said = [label, annotation];
    match () {
        () if said.contains(&Some("false")) => Some(false),
        () if said.contains(&Some("true")) => Some(true),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_chosen_as_citadel_chose_them() {
        let some = ["shop", "bank"].map(str::to_owned);
        let all = Rules { watched: None, by_default: true, own: "istio-system".to_owned() };
        let asked = Rules { by_default: false, ..all.clone() };
        let few = Rules { watched: Some(some.into()), ..all.clone() };
        let cases = [
            (&all, "shop", None, None, false, Choice::Served),
            (&asked, "shop", None, None, false, Choice::Unasked),
            (&few, "shop", None, None, false, Choice::Served),
            (&few, "toys", None, None, false, Choice::Unwatched),
            // What is not watched is not, whatever it says.
            (&few, "toys", Some("true"), Some("istio-system"), false, Choice::Unwatched),
            (&few, "toys", None, None, true, Choice::Unwatched),
            (&all, "shop", None, Some("istio-system"), false, Choice::Served),
            (&asked, "shop", None, Some("istio-system"), false, Choice::Served),
            (&all, "shop", None, Some("other"), false, Choice::Another),
            (&asked, "shop", None, Some("other"), false, Choice::Another),
            (&all, "shop", None, Some(""), false, Choice::Another),
            (&all, "shop", Some("false"), None, false, Choice::Excluded),
            (&asked, "shop", Some("true"), None, false, Choice::Served),
            // It outweighs the other label.
            (&all, "shop", Some("true"), Some("other"), false, Choice::Served),
            (&all, "shop", Some("false"), Some("istio-system"), false, Choice::Excluded),
            // Only these two words are.
            (&all, "shop", Some("yes"), None, false, Choice::Served),
            (&all, "shop", Some("False"), Some("other"), false, Choice::Another),
            (&asked, "shop", Some(""), None, false, Choice::Unasked),
            (&all, "shop", Some("true"), None, true, Choice::Ending),
        ];
        for (rules, name, overriding, environment, is_ending, wanted) in cases {
            let labels = Labels { overriding, environment, is_ending };
            assert_eq!(rules.choose(name, &labels), wanted, "{rules:?} {name} {labels:?}");
        }
    }

    #[test]
    fn an_account_decides_only_what_its_namespace_leaves_open() {
        for (choice, nothing, yes, no) in [
            (Choice::Served, true, true, false),
            (Choice::Unasked, false, true, false),
            (Choice::Unwatched, false, false, false),
            (Choice::Excluded, false, false, false),
            (Choice::Another, false, false, false),
            (Choice::Ending, false, false, false),
        ] {
            let served = [None, Some(true), Some(false)].map(|deliver| choice.serves(deliver));
            assert_eq!(served, [nothing, yes, no], "{choice:?}");
        }
    }

    #[test]
    fn a_label_and_an_annotation_of_an_account_are_worth_the_same() {
        for (label, annotation, wanted) in [
            (None, None, None),
            (Some("true"), None, Some(true)),
            (None, Some("true"), Some(true)),
            (Some("false"), None, Some(false)),
            (None, Some("false"), Some(false)),
            (Some("true"), Some("false"), Some(false)),
            (Some("false"), Some("true"), Some(false)),
            (Some("no"), None, None),
            (Some("no"), Some("true"), Some(true)),
        ] {
            assert_eq!(deliver(label, annotation), wanted, "{label:?} {annotation:?}");
        }
    }
}
