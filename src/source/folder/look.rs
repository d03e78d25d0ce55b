//! Looking at what is there: folders, files and links, one step at a time.

use super::*;

impl FolderSource {
    /// Does the next thing. Whether there was one.
    pub(super) fn step(&mut self) -> bool {
        if let Some(mut scan) = self.scan.take() {
            match scan.entries.pop() {
                Some((name, kind)) => {
                    self.examine(&scan.handle, scan.dir, &name, Some(kind), false);
                    self.scan = Some(scan);
                }
                None => {
                    if let Some(dir) = self.dir_mut(scan.dir) {
                        dir.entries.shrink_to_fit();
                    }
                }
            }
            return true;
        }
        match self.queue.pop_front() {
            Some(Work::List(id)) => self.list(id),
            Some(Work::Links(id)) => self.follow_links(id),
            Some(Work::Name(id, name)) => {
                if let Some(handle) = self.open_known(id) {
                    self.examine(&handle, id, &name, None, true);
                }
            }
            None => return false,
        }
        true
    }

    /// Opens a directory if what is at its path is still it; else sees to it that its owner looks.
    pub(super) fn open_known(&mut self, id: u32) -> Option<Directory> {
        let dir = self.dir(id)?;
        let (identity, owner) = (dir.identity, (dir.parent, dir.name.clone()));
        match Directory::open(&self.path(id)) {
            Ok(handle) if handle.facts.identity == identity => Some(handle),
            Ok(_) => {
                self.look_at_owner(id, owner);
                None
            }
            Err(error) => {
                self.unreadable(id, owner, &error);
                None
            }
        }
    }

    pub(super) fn look_at_owner(&mut self, id: u32, (parent, name): (u32, Box<OsStr>)) {
        if id == ROOT {
            self.queue_list(ROOT);
        } else {
            // Not at once: what is being replaced needs a moment.
            self.pending.names.insert((parent, name));
            self.pending.touch();
        }
    }

    pub(super) fn unreadable(&mut self, id: u32, owner: (u32, Box<OsStr>), error: &io::Error) {
        if id == ROOT {
            self.lose_root(error);
        } else if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
            // The owner will find it gone, if it has not yet.
            let gone = self.path(owner.0);
            let gone = Directory::open(&gone).and_then(|handle| handle.look(&owner.1)).is_err();
            if gone {
                self.queue.push_back(Work::Name(owner.0, owner.1));
            } else {
                self.look_at_owner(id, owner);
            }
        } else {
            self.set_dir_trouble(id, &error.to_string());
        }
    }

    pub(super) fn list(&mut self, id: u32) {
        let Some(dir) = self.dir_mut(id) else { return };
        dir.queued_list = false;
        let handle = if id == ROOT {
            match Directory::open(&self.root) {
                Ok(handle) => {
                    let identity = handle.facts.identity;
                    if self.dir(ROOT).is_some_and(|root| root.identity != identity) {
                        self.replace_identity(ROOT, identity);
                    }
                    Some(handle)
                }
                Err(error) => {
                    self.lose_root(&error);
                    None
                }
            }
        } else {
            self.open_known(id)
        };
        let Some(handle) = handle else { return };
        // First, so that nothing happens unseen between this and the listing.
        self.watch_dir(id, &handle);
        let wanted = |name: &OsStr, kind: Kind| {
            !is_hidden(name) && (is_manifest(name) || matches!(kind, Kind::Directory | Kind::Link))
        };
        let mut entries = match handle.entries(wanted) {
            Ok(entries) => entries,
            Err(error) if id == ROOT => return self.lose_root(&error),
            Err(error) => return self.set_dir_trouble(id, &error.to_string()),
        };
        entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        if self.clear_dir_trouble(id) {
            tracing::info!(folder = %self.path(id).display(), "the folder of manifests can be read again");
        }
        if id == ROOT {
            self.find_root();
        }
        let Some(dir) = self.dir_mut(id) else { return };
        dir.listed = true;
        dir.stamp = handle.facts.stamp;
        let is_there = |name: &OsStr| entries.binary_search_by(|(there, _)| (**there).cmp(name)).is_ok();
        let gone: Vec<_> = dir
            .entries
            .iter()
            .filter(|entry| !is_there(&entry.name))
            .map(|entry| entry.name.clone())
            .collect();
        dir.entries.reserve(entries.len().saturating_sub(dir.entries.len()));
        for name in gone {
            self.remove_entry(id, &name);
        }
        entries.reverse();
        self.scan = Some(Scan { dir: id, handle, entries });
    }

    /// Looks at one entry. A file that has not changed is only read if that is asked for.
    pub(super) fn examine(
        &mut self,
        handle: &Directory,
        id: u32,
        name: &OsStr,
        kind: Option<Kind>,
        anyway: bool,
    ) {
        if self.dir(id).is_none() || is_hidden(name) {
            return;
        }
        let facts = match kind {
            Some(Kind::File) if self.file(id, name).is_none() => None,
            Some(Kind::Link) => None,
            _ => match handle.look(name) {
                Ok(facts) => Some(facts),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return self.remove_entry(id, name),
                Err(error) if is_manifest(name) => {
                    return self.put_unreadable(id, name, false, None, &error.to_string());
                }
                Err(_) => return,
            },
        };
        let kind = facts.map(|facts| facts.kind).or(kind);
        if kind != Some(Kind::Link) {
            self.put_no_link(id, name);
        }
        match (kind, facts) {
            (Some(Kind::Link), _) => self.put_link(id, name),
            (Some(Kind::Directory), Some(facts)) => self.enter(id, name, false, facts.identity, None),
            (Some(Kind::File), facts) if is_manifest(name) => {
                let same = |file: &File| facts.is_some_and(|facts| facts.stamp == file.stamp);
                if anyway || !self.file(id, name).is_some_and(same) {
                    let mut buffer = std::mem::take(&mut self.buffer);
                    let read = handle.read(name, MAX_FILE, &mut buffer);
                    self.put_read(id, name, false, facts, read, &buffer);
                    self.buffer = buffer;
                }
            }
            (Some(Kind::Other), facts) if is_manifest(name) => {
                let identity = facts.map(|facts| facts.identity);
                self.put_unreadable(id, name, false, identity, "it is no regular file");
            }
            _ => self.remove_entry(id, name),
        }
    }

    /// Looks where all links of a directory lead, and sees to it that changes on their way are heard of.
    pub(super) fn follow_links(&mut self, id: u32) {
        let Some(dir) = self.dir_mut(id) else { return };
        dir.queued_links = false;
        if dir.steps.is_empty() && !dir.entries.iter().any(|entry| entry.link) {
            return;
        }
        let names: Vec<_> =
            dir.entries.iter().filter(|entry| entry.link).map(|entry| entry.name.clone()).collect();
        let Some(handle) = self.open_known(id) else { return };
        let Ok(real) = handle.real_path() else { return };
        // Before looking, so that nothing happens unseen between this and that.
        let mut steps = BTreeMap::new();
        let mut ends = Vec::with_capacity(names.len());
        for name in &names {
            let route = tree::follow(&real, name).ok();
            ends.push(route.as_ref().map(|route| route.end.clone()));
            let on_the_way = route.map(|route| route.steps).unwrap_or_default();
            let last = on_the_way.len().saturating_sub(1);
            // The first step is the link itself, of which the directory's own watch tells.
            for (index, step) in on_the_way.into_iter().enumerate().skip(1) {
                *steps.entry(step).or_insert(false) |= index == last;
            }
        }
        self.look_out(id, steps);
        for (name, end) in names.iter().zip(ends) {
            self.follow_link(&handle, id, name, end.as_deref());
        }
    }

    pub(super) fn follow_link(&mut self, handle: &Directory, id: u32, name: &OsStr, end: Option<&Path>) {
        let excluded = |real: &Path| self.excluded_now.iter().any(|(_, path)| real.starts_with(path));
        let facts = match handle.look(name) {
            Ok(facts) if facts.kind == Kind::Link => handle.look_through(name),
            // No link any more.
            Ok(_) | Err(_) => {
                self.queue.push_back(Work::Name(id, name.into()));
                return;
            }
        };
        match facts {
            _ if end.is_some_and(excluded) => self.put_nothing(id, name),
            Ok(facts) if facts.kind == Kind::Directory => self.enter(id, name, true, facts.identity, end),
            Ok(_) if !is_manifest(name) => self.put_nothing(id, name),
            Ok(facts) if facts.kind == Kind::File => {
                if !self.file(id, name).is_some_and(|file| file.stamp == facts.stamp) {
                    let mut buffer = std::mem::take(&mut self.buffer);
                    let read = handle.read_through(name, MAX_FILE, &mut buffer);
                    self.put_read(id, name, true, Some(facts), read, &buffer);
                    self.buffer = buffer;
                }
            }
            Ok(facts) => {
                self.put_unreadable(id, name, true, Some(facts.identity), "it leads to no regular file");
            }
            Err(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::NotFound => "it is a link that leads nowhere".to_owned(),
                    _ if error.raw_os_error() == Some(ELOOP) => {
                        "it is a link that leads in a circle".to_owned()
                    }
                    _ => error.to_string(),
                };
                match self.node(id, name) {
                    // As a folder that is not there: nothing is removed.
                    Some(&Node::Dir(to)) => {
                        let watch = self.dir_mut(to).and_then(|dir| dir.watch.take());
                        self.unwatch(watch);
                        self.set_dir_trouble(to, &reason);
                    }
                    // What it led to was read, and still is where it was found.
                    Some(Node::Alias(_)) => {
                        self.clear_node(id, name);
                        let read = File { stamp: Stamp::UNSURE, names: Names::none(), trouble: None };
                        self.set_node(id, name, true, Node::File(read));
                        self.put_unreadable(id, name, true, None, &reason);
                    }
                    // It may have led to a folder, or be about to.
                    _ if is_manifest(name) || Path::new(name).extension().is_none() => {
                        self.put_unreadable(id, name, true, None, &reason);
                    }
                    _ => self.put_nothing(id, name),
                }
            }
        }
    }

    /// An entry turns out to lead to a directory.
    pub(super) fn enter(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        identity: Identity,
        real: Option<&Path>,
    ) {
        let excluded = self
            .excluded_now
            .iter()
            .any(|(own, path)| *own == identity || real.is_some_and(|real| real.starts_with(path)));
        if excluded {
            return if link { self.put_nothing(id, name) } else { self.remove_entry(id, name) };
        }
        match self.node(id, name) {
            Some(&Node::Dir(to)) => {
                let known = self.by_identity.contains_key(&identity);
                match self.dir(to) {
                    Some(dir) if dir.identity == identity => {
                        if dir.watch.is_none() || dir.trouble.is_some() {
                            self.queue_list(to);
                        }
                        return;
                    }
                    // Another directory took its place. What is below keeps its names, and what they were good for.
                    Some(_) if !known => {
                        self.replace_identity(to, identity);
                        self.queue_list(to);
                        self.queue_links(to);
                        return;
                    }
                    _ => {}
                }
            }
            Some(&Node::Alias(to)) if self.dir(to).is_some_and(|dir| dir.identity == identity) => return,
            _ => {}
        }
        self.clear_node(id, name);
        let node = match self.by_identity.get(&identity) {
            Some(&other) => {
                if let Some(dir) = self.dir_mut(other) {
                    dir.aliases.push((id, name.into()));
                }
                Node::Alias(other)
            }
            None => {
                let new = self.new_dir(id, name.into(), identity);
                self.queue_list(new);
                Node::Dir(new)
            }
        };
        self.set_node(id, name, link, node);
    }
}
