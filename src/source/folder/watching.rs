//! Which folders are watched.

use super::*;

impl FolderSource {
    pub(super) fn watch_dir(&mut self, id: u32, handle: &Directory) {
        if self.dir(id).is_some_and(|dir| dir.watch.is_some()) {
            return;
        }
        // By the handle, which cannot be swapped; by the path where there is no /proc.
        let path = if self.handles { handle.handle() } else { self.path(id) };
        let watch = self.watch(&path, id, true);
        if let Some(dir) = self.dir_mut(id) {
            dir.watch = watch;
        }
    }

    pub(super) fn watch(&mut self, path: &Path, key: u32, contents: bool) -> Option<Watch> {
        #[cfg(test)]
        {
            self.watches_left = self.watches_left.checked_sub(1)?;
        }
        let watcher = self.watcher.as_mut()?;
        let watched = if contents { watcher.watch(path, key) } else { watcher.watch_names(path, key) };
        match watched {
            Ok(watch) => Some(watch),
            Err(error @ watch::Error::Limit { .. }) => {
                if !std::mem::replace(&mut self.limit_told, true) {
                    tracing::warn!(
                        %error,
                        "changes of the manifests beyond are looked for by sweeping over them, which is slower"
                    );
                }
                None
            }
            // Whoever cannot read it will say so.
            Err(_) => None,
        }
    }

    pub(super) fn unwatch(&mut self, watch: Option<Watch>) {
        if let (Some(watcher), Some(watch)) = (&mut self.watcher, watch) {
            watcher.unwatch(watch);
        }
    }

    /// Takes the names that a directory's links lead through.
    pub(super) fn look_out(&mut self, id: u32, steps: BTreeMap<(PathBuf, OsString), bool>) {
        let mut by_lookout: Vec<(u32, Box<OsStr>)> = Vec::with_capacity(steps.len());
        let mut last_ones = BTreeSet::new();
        for ((path, name), last) in steps {
            let lookout = match self.lookout_at.get(&path) {
                Some(&lookout) => lookout,
                None => {
                    let lookout = Lookout { path: path.clone(), watch: None, last: false, users: vec![] };
                    let free = self.lookouts.iter().position(|other| other.users.is_empty());
                    let at = match free.filter(|_| self.lookouts.len() > self.lookout_at.len()) {
                        Some(at) => {
                            self.lookouts[at] = lookout;
                            at
                        }
                        None => {
                            self.lookouts.push(lookout);
                            self.lookouts.len() - 1
                        }
                    } as u32;
                    self.lookout_at.insert(path, at);
                    at
                }
            };
            let users = &mut self.lookouts[lookout as usize].users;
            if !users.contains(&id) {
                users.push(id);
            }
            by_lookout.push((lookout, name.into()));
            if last {
                last_ones.insert(lookout);
            }
        }
        by_lookout.sort_unstable();
        let Some(dir) = self.dir_mut(id) else { return };
        let before = std::mem::replace(&mut dir.steps, by_lookout.into());
        let now: BTreeSet<u32> = dir.steps.iter().map(|(lookout, _)| *lookout).collect();
        let then: BTreeSet<u32> = before.iter().map(|(lookout, _)| *lookout).collect();
        for lookout in then.difference(&now) {
            self.leave_lookout(*lookout, id);
        }
        let mut blind = false;
        for lookout in now {
            let at = &mut self.lookouts[lookout as usize];
            // On the way only names matter, and "/tmp" and the like are busy.
            let more = last_ones.contains(&lookout) && !std::mem::replace(&mut at.last, true);
            if at.watch.is_none() || more {
                let (path, last) = (at.path.clone(), at.last);
                let watch = self.watch(&path, LOOKOUT | lookout, last);
                let before = std::mem::replace(&mut self.lookouts[lookout as usize].watch, watch);
                self.unwatch(before);
            }
            blind |= self.lookouts[lookout as usize].watch.is_none();
        }
        if let Some(dir) = self.dir_mut(id) {
            dir.blind = blind;
        }
    }

    pub(super) fn leave_lookout(&mut self, lookout: u32, id: u32) {
        let Some(left) = self.lookouts.get_mut(lookout as usize) else { return };
        left.users.retain(|user| *user != id);
        if left.users.is_empty() {
            let watch = left.watch.take();
            self.lookout_at.remove(&left.path);
            self.unwatch(watch);
        }
    }
}
