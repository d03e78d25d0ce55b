//! Looking at everything in turn, where watches are missing or cannot be trusted.

use super::*;

impl FolderSource {
    pub(super) fn sweep_a_slice(&mut self, start: Instant) {
        if self.sweep.dir == 0 && self.sweep.entry == 0 {
            self.sweep.round = start;
            self.sweep.only_unwatched = self.dirs.iter().flatten().any(|dir| dir.is_unwatched());
        }
        let only_unwatched = self.sweep.only_unwatched;
        // Not the time on the clock: a busy machine must not make the sweep still slower.
        let before = clock::worked();
        let mut spent = Duration::ZERO;
        while self.sweep.dir < self.dirs.len() && spent < SLICE {
            let wanted =
                self.dirs[self.sweep.dir].as_ref().is_some_and(|dir| !only_unwatched || dir.is_unwatched());
            if !wanted || !self.sweep_entries() {
                self.sweep.dir += 1;
                self.sweep.entry = 0;
            }
            spent = clock::worked().saturating_sub(before);
        }
        let rest = start + spent * if only_unwatched { REST_UNWATCHED } else { REST_WATCHED };
        self.sweep.due = rest;
        if self.sweep.dir >= self.dirs.len() {
            self.sweep.dir = 0;
            self.sweep.entry = 0;
            self.sweep.due = rest.max(self.sweep.round + TICK);
        }
    }

    /// Looks at some entries of a directory. Whether there are more.
    pub(super) fn sweep_entries(&mut self) -> bool {
        let id = self.sweep.dir as u32;
        let Some(dir) = self.dir(id) else { return false };
        let owner = (dir.parent, dir.name.clone());
        let handle = Directory::open(&self.path(id));
        let Some(dir) = self.dirs.get(id as usize).and_then(Option::as_ref) else { return false };
        let handle = match handle {
            Ok(handle) if handle.facts.identity == dir.identity => handle,
            // Known, and told.
            Err(error) if dir.trouble.as_deref() == Some(&*error.to_string()) => return false,
            _ => {
                if id == ROOT {
                    self.tick = Instant::now();
                } else {
                    self.pending.names.insert(owner);
                    self.pending.touch();
                }
                return false;
            }
        };
        if self.sweep.entry == 0 && (dir.trouble.is_some() || handle.facts.stamp != dir.stamp) {
            self.pending.dirs.insert(id);
            self.pending.touch();
        }
        let entries = dir.entries.get(self.sweep.entry..).unwrap_or_default();
        for entry in entries.iter().take(SWEEP_ENTRIES) {
            if entry.link {
                let facts = handle.look_through(&entry.name).ok();
                let same = match (&entry.node, facts) {
                    (Node::File(file), Some(facts)) => file.stamp == facts.stamp,
                    (Node::File(file), None) => file.trouble.is_some(),
                    (Node::Dir(to) | Node::Alias(to), Some(facts)) => {
                        self.dir(*to).is_some_and(|to| to.identity == facts.identity)
                    }
                    (Node::Dir(to) | Node::Alias(to), None) => {
                        self.dir(*to).is_some_and(|to| to.trouble.is_some())
                    }
                    (Node::Nothing, Some(facts)) => facts.kind == Kind::Other || facts.kind == Kind::File,
                    (Node::Nothing, None) => true,
                };
                if !same {
                    self.pending.links.insert(id);
                    self.pending.touch();
                }
            } else if let Node::File(file) = &entry.node {
                let same = handle.look(&entry.name).is_ok_and(|facts| facts.stamp == file.stamp);
                if !same {
                    self.pending.names.insert((id, entry.name.clone()));
                    self.pending.touch();
                }
            }
        }
        self.sweep.entry += SWEEP_ENTRIES;
        entries.len() > SWEEP_ENTRIES
    }
}

impl Dir {
    pub(super) fn is_unwatched(&self) -> bool {
        self.watch.is_none() || self.blind
    }

    pub(super) fn find(&self, name: &OsStr) -> Result<usize, usize> {
        // Listings are read in order.
        match self.entries.last() {
            Some(last) if &*last.name < name => Err(self.entries.len()),
            _ => self.entries.binary_search_by(|entry| (*entry.name).cmp(name)),
        }
    }
}
