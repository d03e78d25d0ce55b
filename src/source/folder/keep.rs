//! Keeping what was found.

use super::*;

impl FolderSource {
    pub(super) fn dir(&self, id: u32) -> Option<&Dir> {
        self.dirs.get(id as usize)?.as_deref()
    }

    pub(super) fn dir_mut(&mut self, id: u32) -> Option<&mut Dir> {
        self.dirs.get_mut(id as usize)?.as_deref_mut()
    }

    pub(super) fn node(&self, id: u32, name: &OsStr) -> Option<&Node> {
        let dir = self.dir(id)?;
        dir.find(name).ok().map(|at| &dir.entries[at].node)
    }

    pub(super) fn file(&self, id: u32, name: &OsStr) -> Option<&File> {
        match self.node(id, name) {
            Some(Node::File(file)) => Some(file),
            _ => None,
        }
    }

    pub(super) fn file_mut(&mut self, id: u32, name: &OsStr) -> Option<&mut File> {
        let dir = self.dir_mut(id)?;
        let at = dir.find(name).ok()?;
        match &mut dir.entries[at].node {
            Node::File(file) => Some(file),
            _ => None,
        }
    }

    /// The file itself, leaving nothing in its place.
    pub(super) fn take_file(&mut self, id: u32, name: &OsStr) -> Option<File> {
        self.file(id, name)?;
        let dir = self.dir_mut(id)?;
        let at = dir.find(name).ok()?;
        match std::mem::replace(&mut dir.entries[at].node, Node::Nothing) {
            Node::File(file) => Some(file),
            _ => None,
        }
    }

    /// Sets what an entry leads to, and makes it if need be.
    pub(super) fn set_node(&mut self, id: u32, name: &OsStr, link: bool, node: Node) {
        let Some(dir) = self.dir_mut(id) else { return };
        match dir.find(name) {
            Ok(at) => {
                dir.entries[at].link = link;
                dir.entries[at].node = node;
            }
            Err(at) => dir.entries.insert(at, Entry { name: name.into(), link, node }),
        }
    }

    /// Where a directory was found.
    pub(super) fn path(&self, id: u32) -> PathBuf {
        let mut names = Vec::new();
        let mut at = id;
        while at != ROOT
            && let Some(dir) = self.dir(at)
        {
            names.push(&*dir.name);
            at = dir.parent;
        }
        let mut path = self.root.clone();
        path.extend(names.into_iter().rev());
        path
    }

    pub(super) fn new_dir(&mut self, parent: u32, name: Box<OsStr>, identity: Identity) -> u32 {
        let dir = Box::new(Dir {
            parent,
            name,
            identity,
            watch: None,
            stamp: Stamp::UNSURE,
            entries: Vec::new(),
            aliases: Vec::new(),
            steps: Box::default(),
            trouble: None,
            listed: false,
            blind: false,
            queued_list: false,
            queued_links: false,
        });
        let id = match self.free.pop() {
            Some(id) => {
                self.dirs[id as usize] = Some(dir);
                id
            }
            None => {
                self.dirs.push(Some(dir));
                (self.dirs.len() - 1) as u32
            }
        };
        self.by_identity.insert(identity, id);
        id
    }

    pub(super) fn replace_identity(&mut self, id: u32, identity: Identity) {
        let Some(dir) = self.dir_mut(id) else { return };
        let before = std::mem::replace(&mut dir.identity, identity);
        dir.stamp = Stamp::UNSURE;
        let watch = dir.watch.take();
        let aliases = std::mem::take(&mut dir.aliases);
        self.unwatch(watch);
        if self.by_identity.get(&before) == Some(&id) {
            self.by_identity.remove(&before);
        }
        self.by_identity.insert(identity, id);
        self.scatter(aliases);
    }

    /// Entries that led to a directory which is known here no longer have to look for themselves.
    pub(super) fn scatter(&mut self, aliases: Vec<(u32, Box<OsStr>)>) {
        for (id, name) in aliases {
            if let Some(dir) = self.dir_mut(id)
                && let Ok(at) = dir.find(&name)
                && let Node::Alias(_) = dir.entries[at].node
            {
                dir.entries[at].node = Node::Nothing;
                self.queue.push_back(Work::Name(id, name));
            }
        }
    }

    pub(super) fn remove_entry(&mut self, id: u32, name: &OsStr) {
        self.clear_node(id, name);
        if let Some(dir) = self.dir_mut(id)
            && let Ok(at) = dir.find(name)
        {
            let entry = dir.entries.remove(at);
            if entry.link {
                self.queue_links(id);
            }
        }
    }

    /// An entry turns out to be a link. Where it leads is looked at with the directory's other links.
    pub(super) fn put_link(&mut self, id: u32, name: &OsStr) {
        match self.dir_mut(id) {
            Some(dir) => match dir.find(name) {
                Ok(at) => dir.entries[at].link = true,
                Err(at) => {
                    dir.entries.insert(at, Entry { name: name.into(), link: true, node: Node::Nothing })
                }
            },
            None => return,
        }
        self.queue_links(id);
    }

    /// An entry turns out to be no link, if it was one.
    pub(super) fn put_no_link(&mut self, id: u32, name: &OsStr) {
        if let Some(dir) = self.dir_mut(id)
            && let Ok(at) = dir.find(name)
            && std::mem::replace(&mut dir.entries[at].link, false)
        {
            self.queue_links(id);
        }
    }

    pub(super) fn put_nothing(&mut self, id: u32, name: &OsStr) {
        self.clear_node(id, name);
    }

    /// Forgets what an entry led to.
    pub(super) fn clear_node(&mut self, id: u32, name: &OsStr) {
        let Some(dir) = self.dir_mut(id) else { return };
        let Ok(at) = dir.find(name) else { return };
        match std::mem::replace(&mut dir.entries[at].node, Node::Nothing) {
            Node::File(file) => self.forget_file(file),
            Node::Dir(to) => self.forget_dir(to),
            Node::Alias(to) => {
                if let Some(other) = self.dir_mut(to) {
                    other.aliases.retain(|(dir, alias)| (*dir, &**alias) != (id, name));
                }
            }
            Node::Nothing => {}
        }
    }

    pub(super) fn forget_file(&mut self, file: File) {
        for account in file.names.as_slice() {
            self.tally.remove(account);
        }
        if let Some(trouble) = file.trouble {
            self.count(&trouble, false);
            if let Some(identity) = trouble.identity {
                self.orphans.insert(identity, trouble.good);
            }
        }
    }

    pub(super) fn forget_dir(&mut self, id: u32) {
        let mut ids = vec![id];
        while let Some(id) = ids.pop() {
            self.clear_dir_trouble(id);
            let Some(dir) = self.dirs.get_mut(id as usize).and_then(Option::take) else { continue };
            self.free.push(id);
            if self.by_identity.get(&dir.identity) == Some(&id) {
                self.by_identity.remove(&dir.identity);
            }
            self.unwatch(dir.watch);
            for (lookout, _) in &dir.steps {
                self.leave_lookout(*lookout, id);
            }
            for entry in dir.entries {
                match entry.node {
                    Node::File(file) => self.forget_file(file),
                    Node::Dir(to) => ids.push(to),
                    Node::Alias(to) => {
                        if let Some(other) = self.dir_mut(to) {
                            other.aliases.retain(|(dir, alias)| (*dir, alias) != (id, &entry.name));
                        }
                    }
                    Node::Nothing => {}
                }
            }
            self.scatter(dir.aliases);
        }
    }

    pub(super) fn put_read(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        before: Option<tree::Facts>,
        read: io::Result<tree::Facts>,
        text: &[u8],
    ) {
        match read {
            Ok(facts) => {
                let found = accounts_in(text);
                self.put_file(
                    id,
                    name,
                    link,
                    Some(facts.identity),
                    facts.stamp,
                    found.accounts,
                    found.faults,
                );
            }
            Err(error) if !link && error.kind() == io::ErrorKind::NotFound => self.remove_entry(id, name),
            Err(error) => {
                let identity = before.map(|facts| facts.identity);
                self.put_unreadable(id, name, link, identity, &error.to_string());
            }
        }
    }

    pub(super) fn put_unreadable(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        identity: Option<Identity>,
        reason: &str,
    ) {
        let fault = Fault { document: 0, reason: reason.to_owned() };
        // What it names is not known, so nothing says that it is other than before.
        let named = self.file(id, name).map(|file| file.names.as_slice().to_vec()).unwrap_or_default();
        self.put_file(id, name, link, identity, Stamp::UNSURE, named, vec![fault]);
    }

    #[expect(clippy::too_many_arguments, reason = "what is known of a file, in one place")]
    pub(super) fn put_file(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        identity: Option<Identity>,
        stamp: Stamp,
        mut accounts: Vec<ServiceAccount>,
        faults: Vec<Fault>,
    ) {
        let before = self.take_file(id, name);
        if before.is_none() {
            self.clear_node(id, name);
        }
        let is_new = before.is_none();
        let (names_before, trouble_before) = match before {
            Some(file) => (file.names, file.trouble),
            None => (Names::none(), None),
        };
        let trouble = (!faults.is_empty()).then(|| {
            let good = match &trouble_before {
                Some(trouble) => trouble.good.clone(),
                None => Remembered { names: names_before.clone(), ever: !is_new },
            };
            accounts.extend_from_slice(good.names.as_slice());
            Box::new(Trouble { identity, faults, good })
        });
        self.tell(id, name, trouble_before.as_deref(), trouble.as_deref());
        if let Some(trouble) = &trouble_before {
            self.count(trouble, false);
        }
        if let Some(trouble) = &trouble {
            self.count(trouble, true);
            if let (true, Some(identity)) = (is_new, identity) {
                self.newcomers.push((identity, id, name.into()));
            }
        }
        let names = self.tally_names(accounts, &names_before);
        self.set_node(id, name, link, Node::File(File { stamp, names, trouble }));
    }

    pub(super) fn tally_names(&mut self, mut accounts: Vec<ServiceAccount>, before: &Names) -> Names {
        accounts.sort_unstable();
        accounts.dedup();
        for account in &mut accounts {
            *account = self.tally.shared(account.clone());
            self.tally.add(account);
        }
        for account in before.as_slice() {
            self.tally.remove(account);
        }
        Names::from(accounts)
    }

    /// A file with faults that was renamed keeps what it named when it was good.
    pub(super) fn adopt_orphans(&mut self) {
        let mut orphans = std::mem::take(&mut self.orphans);
        for (identity, id, name) in std::mem::take(&mut self.newcomers) {
            let Some(good) = orphans.remove(&identity) else { continue };
            let Some(file) = self.file(id, &name) else { continue };
            let Some(trouble) = file.trouble.as_deref().filter(|trouble| !trouble.good.ever) else {
                continue;
            };
            let was_never =
                Trouble { identity: None, faults: trouble.faults.clone(), good: trouble.good.clone() };
            let before = file.names.clone();
            let accounts = [before.as_slice(), good.names.as_slice()].concat();
            let names = self.tally_names(accounts, &before);
            let now = Trouble { identity: Some(identity), faults: was_never.faults.clone(), good };
            self.count(&was_never, false);
            self.count(&now, true);
            if let Some(file) = self.file_mut(id, &name) {
                file.names = names;
                file.trouble = Some(Box::new(now));
            }
        }
    }
}
