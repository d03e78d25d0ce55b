//! What the watches tell, and when it is due.

use super::*;

impl Pending {
    pub(super) fn due(&self) -> Option<Instant> {
        let patience = self.first? + PATIENCE;
        match self.last {
            Some(last) if self.unfinished.is_empty() => Some(patience.min(last + QUIET)),
            _ => Some(patience),
        }
    }

    pub(super) fn touch(&mut self) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        if self.names.len() > MAX_DIRTY {
            self.everything = true;
            self.names.clear();
        }
    }
}

impl FolderSource {
    pub(super) fn note(&mut self, events: Vec<Event<u32>>) {
        for event in events {
            match event {
                Event::Overflow => {
                    self.pending.everything = true;
                    self.pending.touch();
                }
                Event::Gone { key } => self.note_gone(key),
                Event::Changed { key, name } => self.note_changed(key, name, false),
                Event::Writing { key, name } => self.note_changed(key, name, true),
            }
        }
    }

    pub(super) fn note_gone(&mut self, key: u32) {
        if key & LOOKOUT != 0 {
            let Some(lookout) = self.lookouts.get_mut((key & !LOOKOUT) as usize) else { return };
            let watch = lookout.watch.take();
            self.pending.links.extend(&lookout.users);
            self.unwatch(watch);
        } else {
            let Some(dir) = self.dir_mut(key) else { return };
            let watch = dir.watch.take();
            let owner = (dir.parent, dir.name.clone());
            self.unwatch(watch);
            if key == ROOT {
                self.tick = Instant::now();
            } else {
                self.pending.names.insert(owner);
            }
        }
        self.pending.touch();
    }

    pub(super) fn note_changed(&mut self, key: u32, name: Option<OsString>, writing: bool) {
        if key & LOOKOUT != 0 {
            let id = key & !LOOKOUT;
            let Some(lookout) = self.lookouts.get(id as usize) else { return };
            for &user in &lookout.users {
                let Some(dir) = self.dirs.get(user as usize).and_then(Option::as_ref) else { continue };
                let concerned = name.as_deref().is_none_or(|name| {
                    dir.steps.binary_search_by(|(at, step)| (*at, &**step).cmp(&(id, name))).is_ok()
                });
                if concerned {
                    self.pending.links.insert(user);
                    self.pending.touch();
                }
            }
            return;
        }
        let Some(name) = name else {
            self.pending.dirs.insert(key);
            return self.pending.touch();
        };
        if is_hidden(&name) {
            return;
        }
        let entry = (key, name.into_boxed_os_str());
        if !writing {
            self.pending.unfinished.remove(&entry);
        } else if is_manifest(&entry.1) {
            self.pending.unfinished.insert(entry.clone());
        } else {
            return;
        }
        self.pending.names.insert(entry);
        self.pending.touch();
    }

    pub(super) fn queue_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if self.lost.is_some() {
            return;
        }
        self.refresh_excluded();
        if pending.everything {
            return self.queue_everything();
        }
        for dir in pending.dirs {
            self.queue_list(dir);
        }
        for dir in pending.links {
            self.queue_links(dir);
        }
        self.queue.extend(pending.names.into_iter().map(|(dir, name)| Work::Name(dir, name)));
    }

    pub(super) fn queue_everything(&mut self) {
        self.refresh_excluded();
        for dir in 0..self.dirs.len() as u32 {
            self.queue_list(dir);
            self.queue_links(dir);
        }
    }

    pub(super) fn queue_list(&mut self, id: u32) {
        if let Some(dir) = self.dir_mut(id)
            && !std::mem::replace(&mut dir.queued_list, true)
        {
            self.queue.push_back(Work::List(id));
        }
    }

    pub(super) fn queue_links(&mut self, id: u32) {
        if let Some(dir) = self.dir_mut(id)
            && !std::mem::replace(&mut dir.queued_links, true)
        {
            self.queue.push_back(Work::Links(id));
        }
    }

    pub(super) fn refresh_excluded(&mut self) {
        self.excluded_now.clear();
        for path in &self.excluded {
            if let Ok(handle) = Directory::open(path)
                && let Ok(real) = handle.real_path()
            {
                self.excluded_now.push((handle.facts.identity, real));
            }
        }
    }
}
