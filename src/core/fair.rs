//! Who is next when several wait: round robin over sources, within a source over credentials, and first come, first
//! served within those. Bounded: when it is full, whoever fills it loses, and not a newcomer who hardly takes part.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A bounded queue that is fair to sources `S` first and to the credentials `C` within each source then.
#[derive(Debug)]
pub struct Fair<S, C, T> {
    line: Rounds<S, Rounds<C, Fifo<T>>>,
    most: usize,
    next: u64,
}

/// Where something waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<S, C> {
    source: S,
    credential: C,
    number: u64,
}

impl<S: Copy + Ord, C: Copy + Ord, T> Fair<S, C, T> {
    /// Holds at most so many.
    pub fn new(most: usize) -> Self {
        Self { line: Rounds::default(), most, next: 0 }
    }

    /// Adds one at the end of its own line. If that makes one too many, the last of the longest line is pushed out: of
    /// the source with the most, the credential with the most. Where others have as many, it is the newcomer.
    pub fn push(&mut self, source: S, credential: C, item: T) -> (Place<S, C>, Option<T>) {
        let number = self.next;
        self.next += 1;
        self.line.push((source, (credential, ())), number, item);
        let out = if self.line.len() > self.most { self.line.drop_newest() } else { None };
        (Place { source, credential, number }, out)
    }

    /// Takes whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        self.line.pop()
    }

    /// Takes one that no longer wants to wait, if it still does.
    pub fn remove(&mut self, place: &Place<S, C>) -> Option<T> {
        self.line.remove((place.source, (place.credential, ())), place.number)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.line.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What can be waited in.
trait Line: Default {
    type Item;
    /// Which line within the line.
    type Path;

    fn push(&mut self, path: Self::Path, number: u64, item: Self::Item);
    fn pop(&mut self) -> Option<Self::Item>;
    fn remove(&mut self, path: Self::Path, number: u64) -> Option<Self::Item>;
    fn drop_newest(&mut self) -> Option<Self::Item>;
    fn len(&self) -> usize;
}

/// Room for so many is kept when a crowd is gone.
const FEW: usize = 64;

/// By number, which only grows. Whoever leaves early leaves a gap, of which there are never more than items; there is none
/// at either end.
#[derive(Debug)]
struct Fifo<T> {
    items: VecDeque<(u64, Option<T>)>,
    len: usize,
}

impl<T> Default for Fifo<T> {
    fn default() -> Self {
        Self { items: VecDeque::new(), len: 0 }
    }
}

impl<T> Fifo<T> {
    fn first(&self) -> Option<&T> {
        self.items.front()?.1.as_ref()
    }

    fn without(&mut self, item: Option<T>) -> Option<T> {
        self.len -= usize::from(item.is_some());
        while self.items.front().is_some_and(|(_, item)| item.is_none()) {
            self.items.pop_front();
        }
        while self.items.back().is_some_and(|(_, item)| item.is_none()) {
            self.items.pop_back();
        }
        if self.items.len() > 2 * self.len {
            self.items.retain(|(_, item)| item.is_some());
        }
        if self.items.capacity() > FEW.max(4 * self.len) {
            self.items.shrink_to(2 * self.len);
        }
        item
    }
}

impl<T> Line for Fifo<T> {
    type Item = T;
    type Path = ();

    fn push(&mut self, (): (), number: u64, item: T) {
        self.items.push_back((number, Some(item)));
        self.len += 1;
    }

    fn pop(&mut self) -> Option<T> {
        let (_, item) = self.items.pop_front()?;
        self.without(item)
    }

    fn remove(&mut self, (): (), number: u64) -> Option<T> {
        let at = self.items.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let item = self.items[at].1.take();
        self.without(item)
    }

    fn drop_newest(&mut self) -> Option<T> {
        let (_, item) = self.items.pop_back()?;
        self.without(item)
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// Lines that are served in turns. One that empties is forgotten at once, so that strangers leave nothing behind.
#[derive(Debug)]
struct Rounds<K, L> {
    lines: BTreeMap<K, Member<L>>,
    /// Whose turn it is: the first's.
    order: Fifo<K>,
    /// The longest is last, and of those the one that became so last.
    lengths: BTreeSet<(usize, u64, K)>,
    len: usize,
    /// Draws positions and changes.
    tick: u64,
}

#[derive(Debug)]
struct Member<L> {
    line: L,
    position: u64,
    changed: u64,
}

impl<K, L> Default for Rounds<K, L> {
    fn default() -> Self {
        let (lines, order, lengths) = (BTreeMap::new(), Fifo::default(), BTreeSet::new());
        Self { lines, order, lengths, len: 0, tick: 0 }
    }
}

impl<K: Copy + Ord, L: Line> Rounds<K, L> {
    /// Changes one line, and everything that is known of it.
    fn change<R>(&mut self, key: K, served: bool, change: impl FnOnce(&mut L) -> R) -> Option<R> {
        let member = self.lines.get_mut(&key)?;
        let before = member.line.len();
        let changed = change(&mut member.line);
        let after = member.line.len();
        self.len = self.len - before + after;
        self.tick += 1;
        self.lengths.remove(&(before, member.changed, key));
        if after > 0 {
            member.changed = self.tick;
            self.lengths.insert((after, self.tick, key));
        }
        if served || after == 0 {
            self.order.remove((), member.position);
        }
        if after == 0 {
            self.lines.remove(&key);
        } else if served {
            member.position = self.tick;
            self.order.push((), self.tick, key);
        }
        Some(changed)
    }
}

impl<K: Copy + Ord, L: Line> Line for Rounds<K, L> {
    type Item = L::Item;
    type Path = (K, L::Path);

    fn push(&mut self, (key, path): Self::Path, number: u64, item: L::Item) {
        self.tick += 1;
        let (tick, order) = (self.tick, &mut self.order);
        self.lines.entry(key).or_insert_with(|| {
            order.push((), tick, key);
            Member { line: L::default(), position: tick, changed: tick }
        });
        self.change(key, false, |line| line.push(path, number, item));
    }

    fn pop(&mut self) -> Option<L::Item> {
        let key = *self.order.first()?;
        self.change(key, true, L::pop)?
    }

    fn remove(&mut self, (key, path): Self::Path, number: u64) -> Option<L::Item> {
        self.change(key, false, |line| line.remove(path, number))?
    }

    fn drop_newest(&mut self) -> Option<L::Item> {
        let (_, _, key) = *self.lengths.last()?;
        self.change(key, false, L::drop_newest)?
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn popped<T>(fair: &mut Fair<u8, u8, T>) -> Vec<T> {
        std::iter::from_fn(|| fair.pop()).collect()
    }

    #[test]
    fn sources_take_turns_and_credentials_within_them() {
        let mut fair = Fair::new(100);
        for n in 0..4 {
            fair.push(1, 1, format!("1.1.{n}"));
        }
        for n in 0..2 {
            fair.push(1, 2, format!("1.2.{n}"));
        }
        fair.push(2, 1, "2.1.0".to_owned());
        assert_eq!(popped(&mut fair), ["1.1.0", "2.1.0", "1.2.0", "1.1.1", "1.2.1", "1.1.2", "1.1.3"]);
    }

    #[test]
    fn a_full_queue_pushes_out_whoever_fills_it() {
        let mut fair = Fair::new(4);
        for n in 0..3 {
            assert_eq!(fair.push(1, 1, n).1, None);
        }
        assert_eq!(fair.push(1, 2, 10).1, None);
        // The source with the most, of it the credential with the most, of it the newest.
        assert_eq!(fair.push(2, 1, 20).1, Some(2));
        // Now one source has 3 and the other 1: a second of the other is still the lighter one.
        assert_eq!(fair.push(2, 1, 21).1, Some(1));
        // Both have 2: the newcomer would have the most.
        assert_eq!(fair.push(2, 1, 22).1, Some(22));
        // A third source is lighter than both.
        assert!(fair.push(3, 1, 30).1.is_some_and(|out| [0, 10, 21].contains(&out)));
        assert_eq!(fair.len(), 4);
    }

    #[test]
    fn among_equals_the_newcomer_is_sent_away() {
        let mut fair = Fair::new(3);
        for source in 0..3 {
            assert_eq!(fair.push(source, 1, source).1, None);
        }
        assert_eq!(fair.push(9, 1, 9).1, Some(9));
        assert_eq!(popped(&mut fair), [0, 1, 2]);
    }

    #[test]
    fn strangers_leave_nothing_behind() {
        let mut fair = Fair::new(1_000);
        let places: Vec<_> = (0..1_000).map(|n| fair.push(n, n, ()).0).collect();
        for place in places.iter().skip(1).filter(|place| place.source % 3 != 0) {
            assert_eq!(fair.remove(place), Some(()));
        }
        let gaps = &fair.line.order;
        assert!(gaps.len == 334 && gaps.items.len() <= 2 * gaps.len, "{}", gaps.items.len());
        while fair.pop().is_some() {}
        assert!(fair.line.order.items.capacity() <= FEW);
        let mut fair = Fair::new(10);
        for n in 0..1_000 {
            let (place, _) = fair.push(n, n, ());
            if n % 2 == 0 {
                assert_eq!(fair.remove(&place), Some(()));
                assert_eq!(fair.remove(&place), None);
            } else {
                fair.pop();
            }
        }
        let Rounds { lines, order, lengths, len, .. } = &fair.line;
        assert_eq!((lines.len(), order.len(), lengths.len(), *len), (0, 0, 0, 0));
    }

    #[derive(Clone, Debug)]
    enum Do {
        Push(u8, u8),
        Pop,
        Remove(usize),
    }

    fn doing() -> impl Strategy<Value = Do> {
        // Few sources do most of it.
        prop_oneof![
            4 => (prop_oneof![4 => Just(0u8), 1 => 0..5u8], 0..3u8).prop_map(|(s, c)| Do::Push(s, c)),
            3 => Just(Do::Pop),
            1 => any::<usize>().prop_map(Do::Remove),
        ]
    }

    proptest! {
        /// Against a list of who waits, in the order of coming.
        #[test]
        fn it_is_bounded_works_and_lets_nobody_starve(
            doings in proptest::collection::vec(doing(), 1..400),
            most in 1..40usize,
        ) {
            let mut fair = Fair::new(most);
            let mut waiting: Vec<(Place<u8, u8>, u64)> = Vec::new();
            // Who was passed over by whom since it began to wait: a source by another, a credential by its brother.
            let mut passed: HashMap<(u8, u8), u32> = HashMap::new();
            let mut passed_within: HashMap<(u8, u8, u8), u32> = HashMap::new();
            let mut item = 0;
            for doing in doings {
                match doing {
                    Do::Push(source, credential) => {
                        item += 1;
                        let (place, out) = fair.push(source, credential, item);
                        waiting.push((place, item));
                        prop_assert_eq!(out.is_some(), waiting.len() > most);
                        if let Some(out) = out {
                            let at = waiting.iter().position(|(_, item)| *item == out).unwrap();
                            let place = waiting[at].0;
                            let of_source = |s: u8| waiting.iter().filter(|(p, _)| p.source == s).count();
                            let of_flow = |c: u8| {
                                let same = |p: &Place<u8, u8>| (p.source, p.credential) == (place.source, c);
                                waiting.iter().filter(|(p, _)| same(p)).count()
                            };
                            prop_assert!((0..5).all(|s| of_source(s) <= of_source(place.source)));
                            prop_assert!((0..3).all(|c| of_flow(c) <= of_flow(place.credential)));
                            let newest = waiting.iter().rev().find(|(p, _)| {
                                (p.source, p.credential) == (place.source, place.credential)
                            });
                            prop_assert_eq!(newest.unwrap().1, out);
                            waiting.remove(at);
                        }
                    }
                    Do::Pop => {
                        let served = fair.pop();
                        prop_assert_eq!(served.is_some(), !waiting.is_empty(), "works while anybody waits");
                        let Some(served) = served else { continue };
                        let at = waiting.iter().position(|(_, item)| *item == served).unwrap();
                        let (place, _) = waiting.remove(at);
                        let brother = waiting[..at].iter().any(|(p, _)| {
                            (p.source, p.credential) == (place.source, place.credential)
                        });
                        prop_assert!(!brother, "first come, first served");
                        passed.retain(|(over, _), _| *over != place.source);
                        passed_within.retain(|(s, over, _), _| (*s, *over) != (place.source, place.credential));
                        let sources: std::collections::BTreeSet<u8> =
                            waiting.iter().map(|(p, _)| p.source).filter(|s| *s != place.source).collect();
                        for over in sources {
                            let count = passed.entry((over, place.source)).or_default();
                            *count += 1;
                            prop_assert!(*count <= 1, "{} served twice before {over}", place.source);
                        }
                        let brothers: std::collections::BTreeSet<u8> = waiting
                            .iter()
                            .filter(|(p, _)| p.source == place.source && p.credential != place.credential)
                            .map(|(p, _)| p.credential)
                            .collect();
                        for over in brothers {
                            let key = (place.source, over, place.credential);
                            let count = passed_within.entry(key).or_default();
                            *count += 1;
                            prop_assert!(*count <= 1, "{} served twice before {over}", place.credential);
                        }
                    }
                    Do::Remove(at) if !waiting.is_empty() => {
                        let (place, item) = waiting.remove(at % waiting.len());
                        prop_assert_eq!(fair.remove(&place), Some(item));
                    }
                    Do::Remove(_) => prop_assert!(fair.is_empty()),
                }
                // Whoever no longer waits is not passed over.
                let waits = |s: u8| waiting.iter().any(|(p, _)| p.source == s);
                passed.retain(|(over, _), _| waits(*over));
                passed_within
                    .retain(|(s, over, _), _| waiting.iter().any(|(p, _)| (p.source, p.credential) == (*s, *over)));
                prop_assert_eq!(fair.len(), waiting.len());
            }
        }
    }
}
