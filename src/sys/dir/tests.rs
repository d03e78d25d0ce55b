use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use super::*;

fn temporary() -> (tempfile::TempDir, Dir) {
    let folder = tempfile::tempdir().unwrap();
    let dir = Dir::open_trusted(folder.path(), None).unwrap();
    (folder, dir)
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[test]
fn a_name_is_one_component() {
    let (_folder, dir) = temporary();
    for name in ["", ".", "..", "a/b", "/", "/etc", "a\0b", "../x"] {
        let access = Access::mode(0o600);
        assert!(matches!(dir.read(name, 9), Err(Error::Name { .. })), "{name:?}");
        assert!(matches!(dir.write_new(name, b"", access), Err(Error::Name { .. })), "{name:?}");
        assert!(matches!(dir.unlink(name), Err(Error::Name { .. })));
        assert!(matches!(dir.subdir(name), Err(Error::Name { .. })));
        assert!(matches!(dir.symlink("x", name), Err(Error::Name { .. })));
        assert!(matches!(dir.rename("x", &dir, name), Err(Error::Name { .. })));
        assert!(matches!(dir.replace(name, b"", access), Err(Error::Name { .. })));
    }
}

#[test]
fn links_are_never_followed() {
    let (folder, dir) = temporary();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("secret"), "x").unwrap();
    symlink(elsewhere.path(), folder.path().join("way")).unwrap();
    symlink(elsewhere.path().join("secret"), folder.path().join("secret")).unwrap();

    let error = dir.subdir("way").unwrap_err();
    assert!(matches!(error, Error::NotFolder { found: Kind::Link, .. }), "{error}");
    let error = dir.read("secret", 9).unwrap_err();
    assert!(matches!(error, Error::NotFile { found: Kind::Link, .. }), "{error}");
    assert!(dir.append_to("secret", Access::mode(0o600)).is_err());
    assert!(dir.lock("secret", "").is_err());
    dir.replace("secret", b"new", Access::mode(0o600)).unwrap();
    assert_eq!(std::fs::read_to_string(elsewhere.path().join("secret")).unwrap(), "x");
    assert_eq!(dir.read("secret", 9).unwrap().0, b"new");
}

#[test]
fn only_a_regular_file_of_bounded_size_is_read() {
    let (folder, dir) = temporary();
    std::fs::write(folder.path().join("ten"), "0123456789").unwrap();
    assert_eq!(dir.read("ten", 10).unwrap().0, b"0123456789");
    assert!(matches!(dir.read("ten", 9), Err(Error::TooLarge { limit: 9, .. })));
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    assert!(matches!(dir.read("folder", 9), Err(Error::NotFile { found: Kind::Folder, .. })));
    fs::mknodat(&dir, "pipe", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    // Would hang for ever if it were opened as other programs do.
    assert!(matches!(dir.read("pipe", 9), Err(Error::NotFile { found: Kind::Other, .. })));
    let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    assert!(matches!(dir.read("socket", 9), Err(Error::NotFile { found: Kind::Other, .. })));
    let sparse = std::fs::File::create(folder.path().join("huge")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    assert!(matches!(dir.read("huge", 1 << 20), Err(Error::TooLarge { .. })));
    assert!(dir.read("none", 9).unwrap_err().is_absent());
    // Says size zero and has bytes all the same.
    let proc = Dir::open_trusted(Path::new("/proc/self"), None).unwrap();
    assert!(!proc.read("status", 1 << 16).unwrap().0.is_empty());
    assert!(matches!(proc.read("status", 10), Err(Error::TooLarge { .. })));
}

#[test]
fn access_is_exact_whatever_the_umask() {
    let (folder, dir) = temporary();
    let before = process::umask(Mode::from_raw_mode(0o077));
    let file = dir.write_new("file", b"x", Access::mode(0o644));
    let made = dir.create_subdir("made", Access::mode(0o755));
    process::umask(before);
    assert_eq!(file.unwrap().mode(), 0o644);
    made.unwrap();
    assert_eq!(mode(&folder.path().join("file")), 0o644);
    assert_eq!(mode(&folder.path().join("made")), 0o755);
    assert!(dir.write_new("file", b"y", Access::mode(0o644)).unwrap_err().is_taken());
    assert_eq!(dir.read("file", 9).unwrap().0, b"x");
}

#[test]
fn owner_and_group_are_set() {
    let (folder, dir) = temporary();
    let access = Access {
        mode: 0o640,
        owner: Some(process::geteuid().as_raw()),
        group: Some(process::getegid().as_raw()),
    };
    let stat = dir.write_new("mine", b"x", access).unwrap();
    assert!(access.is_of(&stat));
    let others = Access { mode: 0o640, owner: Some(12_345), group: Some(12_346) };
    match dir.write_new("theirs", b"x", others) {
        Ok(stat) => {
            assert_eq!((stat.owner(), stat.group()), (12_345, 12_346));
            assert_eq!(stat.mode(), 0o640);
        }
        // Only root gives files away; then nothing half done stays.
        Err(error) => {
            assert!(error.is_denied(), "{error}");
            assert!(!folder.path().join("theirs").exists());
        }
    }
}

#[test]
fn a_folder_that_may_not_be_opened_is_reopened() {
    let (folder, dir) = temporary();
    std::fs::create_dir(folder.path().join("closed")).unwrap();
    chmod(&folder.path().join("closed"), 0);
    dir.reopen_to_us("closed", 0o700).unwrap();
    assert_eq!(mode(&folder.path().join("closed")), 0o700);
    symlink("closed", folder.path().join("link")).unwrap();
    assert!(dir.reopen_to_us("link", 0o777).is_err());
    assert_eq!(mode(&folder.path().join("closed")), 0o700);
}

#[test]
fn a_replacement_is_old_or_new_wherever_it_is_killed() {
    for old in [None, Some("old")] {
        for count in 0.. {
            let (folder, dir) = temporary();
            if let Some(old) = old {
                dir.write_new("state", old.as_bytes(), Access::mode(0o600)).unwrap();
            }
            let (result, reached) =
                fault::killed_after(count, || dir.replace("state", b"new", Access::mode(0o600)));
            let found = std::fs::read_to_string(folder.path().join("state")).ok();
            match (&result, found.as_deref()) {
                (Ok(()), found) => assert_eq!(found, Some("new")),
                (Err(_), found) => assert!(found == old || found == Some("new")),
            }
            dir.replace("state", b"next", Access::mode(0o600)).unwrap();
            assert_eq!(dir.names().unwrap().len(), 1, "after {count} changes");
            if !reached {
                assert!(count >= 5, "too few changes were tried: {count}");
                break;
            }
        }
    }
}

#[test]
fn a_full_disk_leaves_the_old_file_and_nothing_else() {
    for count in 0.. {
        let (folder, dir) = temporary();
        dir.write_new("state", b"old", Access::mode(0o600)).unwrap();
        let (result, reached) =
            fault::full_after(count, || dir.replace("state", b"new", Access::mode(0o600)));
        if !reached {
            result.unwrap();
            assert!(count >= 5, "too few changes were tried: {count}");
            break;
        }
        let error = text(result.unwrap_err());
        assert!(error.contains("no space left"), "{error}");
        let found = std::fs::read_to_string(folder.path().join("state")).unwrap();
        assert!(found == "old" || found == "new");
        assert_eq!(dir.names().unwrap().len(), 1, "after {count} changes");
    }
}

fn build(dir: &Dir, content: &str) -> Result<(), Error> {
    dir.replace_dir("authority", Access::mode(0o700), |inside| {
        for name in ["one", "two"] {
            inside.write_new_synced(name, content.as_bytes(), Access::mode(0o600))?;
        }
        Ok(())
    })
}

fn built(folder: &Path) -> Option<(String, String)> {
    let read = |name| std::fs::read_to_string(folder.join("authority").join(name)).ok();
    match (read("one"), read("two")) {
        (Some(one), Some(two)) => Some((one, two)),
        (None, None) => None,
        other => panic!("half a folder: {other:?}"),
    }
}

#[test]
fn a_replaced_folder_is_old_or_new_wherever_it_is_killed_or_the_disk_is_full() {
    let pair = |text: &str| Some((text.to_owned(), text.to_owned()));
    for old in [None, Some("old")] {
        for kill in [true, false] {
            for count in 0.. {
                let (folder, dir) = temporary();
                if let Some(old) = old {
                    build(&dir, old).unwrap();
                }
                let (result, reached) = if kill {
                    fault::killed_after(count, || build(&dir, "new"))
                } else {
                    fault::full_after(count, || build(&dir, "new"))
                };
                let found = built(folder.path());
                match result {
                    Ok(()) => assert_eq!(found, pair("new")),
                    Err(_) => assert!(found == old.and_then(pair) || found == pair("new")),
                }
                dir.clear_leftovers().unwrap();
                assert!(dir.names().unwrap().len() <= 1, "after {count} changes");
                build(&dir, "next").unwrap();
                assert_eq!(built(folder.path()), pair("next"));
                if !reached {
                    assert!(count >= 8, "too few changes were tried: {count}");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_new_name_replaces_nothing() {
    let (folder, dir) = temporary();
    std::fs::create_dir(folder.path().join("one")).unwrap();
    std::fs::create_dir(folder.path().join("two")).unwrap();
    assert!(dir.rename_new("one", "two").unwrap_err().is_taken());
    dir.rename_new("one", "three").unwrap();
    assert!(folder.path().join("three").is_dir());
}

#[test]
fn a_line_that_does_not_fit_is_taken_back() {
    let (folder, dir) = temporary();
    let mut log = dir.append_to("log", Access::mode(0o600)).unwrap();
    log.append(b"one\n").unwrap();
    log.sync().unwrap();
    drop(log);
    let mut log = dir.append_to("log", Access::mode(0o600)).unwrap();
    assert_eq!(log.length(), 4);
    log.append(b"two\n").unwrap();
    let found = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(found, "one\ntwo\n");
}

#[test]
fn the_second_learns_who_holds_the_lock() {
    let (folder, dir) = temporary();
    let lock = dir.lock("lock", "{\"pid\": 7}\n").unwrap();
    let other = Dir::open_trusted(folder.path(), None).unwrap();
    let error = text(other.lock("lock", "me").unwrap_err());
    assert!(error.contains("{\"pid\": 7}"), "{error}");
    assert!(error.contains(&folder.path().display().to_string()), "{error}");
    drop(lock);
    let lock = other.lock("lock", "x").unwrap();
    let found = std::fs::read_to_string(folder.path().join("lock")).unwrap();
    assert_eq!(found, "x");
    // A lock file that somebody removed locks nothing any more, and harms nobody.
    std::fs::remove_file(folder.path().join("lock")).unwrap();
    let _second = dir.lock("lock", "y").unwrap();
    drop(lock);
}

#[test]
fn a_missing_folder_is_made_with_its_parents_or_missed() {
    let (folder, _dir) = temporary();
    let path = folder.path().join("a").join("b");
    assert!(Dir::open_trusted(&path, None).unwrap_err().is_absent());
    let dir = Dir::open_trusted(&path, Some(0o700)).unwrap();
    assert_eq!(mode(&path), 0o700);
    assert_eq!(dir.path(), path);
    assert!(dir.names().unwrap().is_empty());
    let up = Dir::open_trusted(&path.join("..").join(".").join("b").join(".."), None).unwrap();
    assert_eq!(up.path(), folder.path().join("a"));
    assert_eq!(up.names().unwrap().len(), 1);
    std::fs::write(folder.path().join("file"), "").unwrap();
    let error = Dir::open_trusted(&folder.path().join("file"), Some(0o700)).unwrap_err();
    assert!(text(&error).contains("is a file, not a folder"), "{error}");
}

#[test]
fn a_folder_that_others_may_write_to_is_refused_with_the_way_out() {
    let (folder, _dir) = temporary();
    let path = folder.path().join("data");
    std::fs::create_dir(&path).unwrap();
    for bad in [0o777, 0o1777, 0o702] {
        chmod(&path, bad);
        let error = text(Dir::open_trusted(&path, None).unwrap_err());
        assert!(error.contains(&format!("{bad:04o}")), "{error}");
        assert!(error.contains(&format!("chmod go-w {}", path.display())), "{error}");
    }
    for good in [0o700, 0o755] {
        chmod(&path, good);
        Dir::open_trusted(&path, None).unwrap();
    }
}

#[test]
fn a_folder_below_one_that_others_may_write_to_is_refused_unless_it_is_sticky() {
    let (folder, _dir) = temporary();
    let above = folder.path().join("above");
    let path = above.join("data");
    std::fs::create_dir_all(&path).unwrap();
    chmod(&path, 0o700);
    chmod(&above, 0o777);
    let error = text(Dir::open_trusted(&path, None).unwrap_err());
    assert!(error.contains(&format!("chmod go-w {}", above.display())), "{error}");
    chmod(&above, 0o1777);
    Dir::open_trusted(&path, None).unwrap();
}

#[test]
fn folders_and_links_of_other_users_are_refused() {
    let (folder, _dir) = temporary();
    let path = folder.path().join("data");
    std::fs::create_dir(&path).unwrap();
    symlink(&path, folder.path().join("link")).unwrap();
    assert_eq!(Dir::open_trusted(&folder.path().join("link"), None).unwrap().path(), path);
    if !process::geteuid().is_root() {
        // Another user's folder that is always there.
        let error = text(Dir::open_trusted(Path::new("/usr"), None).unwrap_err());
        assert!(error.contains("belongs to user 0"), "{error}");
        return;
    }
    std::os::unix::fs::lchown(folder.path().join("link"), Some(12_345), None).unwrap();
    let error = text(Dir::open_trusted(&folder.path().join("link"), None).unwrap_err());
    assert!(error.contains("belongs to user 12345"), "{error}");
    let below = path.join("below");
    std::fs::create_dir(&below).unwrap();
    chown(&path, Some(12_345), None).unwrap();
    let error = text(Dir::open_trusted(&path, None).unwrap_err());
    assert!(error.contains(&format!("chown 0 {}", path.display())), "{error}");
    let error = text(Dir::open_trusted(&below, None).unwrap_err());
    assert!(error.contains("belongs to user 12345"), "{error}");
}

#[test]
fn a_loop_of_links_ends() {
    let (folder, _dir) = temporary();
    symlink("b", folder.path().join("a")).unwrap();
    symlink("a", folder.path().join("b")).unwrap();
    let error = text(Dir::open_trusted(&folder.path().join("a"), Some(0o700)).unwrap_err());
    assert!(error.contains("symbolic links"), "{error}");
}

#[test]
fn a_group_is_private_when_its_owner_alone_is_in_it() {
    let users = "root:x:0:0::/:\nann:x:1000:1000::/:\nbob:x:1001:1001::/:\neve:x:1002:1001::/:";
    let groups = "root:x:0:\nann:x:1000:ann\nbob:x:1001:\nstaff:x:50:ann,bob\nsolo:x:51:ann";
    assert!(trust::is_private_group(users, groups, 1000, 1000));
    assert!(trust::is_private_group(users, groups, 1000, 51));
    assert!(trust::is_private_group(users, groups, 0, 0));
    // Eve's first group is Bob's.
    assert!(!trust::is_private_group(users, groups, 1001, 1001));
    assert!(!trust::is_private_group(users, groups, 1000, 50));
    // Nobody knows who else is in there.
    assert!(!trust::is_private_group(users, groups, 1000, 4242));
    assert!(!trust::is_private_group(users, groups, 4242, 1000));
    assert!(!trust::is_private_group("", "", 1000, 1000));
}
