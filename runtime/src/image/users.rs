//! Looking up the image's user in the image's own databases, which are as hostile as the rest of it.

use std::io::Read;
use std::path::Path;

use super::Error;
use super::root::Root;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// No database is larger.
const MAX_DATABASE: u64 = 4 << 20;

/// Whom the process runs as.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct User {
    pub uid: u32,
    pub gid: u32,
    /// The groups that list the user, where the image does not name a group.
    pub additional_gids: Vec<u32>,
    /// The user's home, if the database tells it.
    pub home: Option<String>,
}

/// Finds `spec`: empty, `USER` or `USER:GROUP`, each a name or a number.
pub(super) fn find(root: &Root, spec: &str) -> Result<User, Error> {
    let passwd = read(root, PASSWD)?;
    let group = read(root, GROUP)?;
    resolve(spec, &passwd, &group)
}

fn read(root: &Root, path: &'static str) -> Result<String, Error> {
    let file = root
        .file(Path::new(path))
        .map_err(Error::io("open the image's", path))?;
    let mut bytes = Vec::new();
    if let Some(file) = file {
        file.take(MAX_DATABASE)
            .read_to_end(&mut bytes)
            .map_err(Error::io("read the image's", path))?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User, Error> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = parse_id(user);

    // name:password:uid:gid:comment:home:shell; a name goes before a number.
    let entries = || {
        passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|fields| fields.len() >= 6)
    };
    let entry = entries().find(|fields| fields[0] == user).or_else(|| {
        let uid = number?;
        entries().find(|fields| parse_id(fields[2]) == Some(uid))
    });
    let not_found = |kind, name: &str, file| Error::NoSuchUser {
        kind,
        name: name.to_owned(),
        file,
    };
    let (name, uid, primary, home) = match &entry {
        Some(fields) => {
            let uid = parse_id(fields[2]).ok_or_else(|| not_found("user", user, PASSWD))?;
            let home = Some(fields[5])
                .filter(|home| home.starts_with('/'))
                .map(str::to_owned);
            (Some(fields[0]), uid, parse_id(fields[3]).unwrap_or(0), home)
        }
        None => (
            None,
            number.ok_or_else(|| not_found("user", user, PASSWD))?,
            0,
            None,
        ),
    };

    // name:password:gid:members
    let groups = || {
        group
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|fields| fields.len() >= 4)
    };
    if let Some(wanted) = wanted_group {
        let by_name = groups()
            .find(|fields| fields[0] == wanted)
            .and_then(|fields| parse_id(fields[2]));
        let gid = by_name
            .or_else(|| parse_id(wanted))
            .ok_or_else(|| not_found("group", wanted, GROUP))?;
        return Ok(User {
            uid,
            gid,
            additional_gids: Vec::new(),
            home,
        });
    }
    let mut additional_gids: Vec<u32> = match name {
        Some(name) => groups()
            .filter(|fields| fields[3].split(',').any(|member| member == name))
            .filter_map(|fields| parse_id(fields[2]))
            .filter(|&gid| gid != primary)
            .collect(),
        None => Vec::new(),
    };
    additional_gids.sort_unstable();
    additional_gids.dedup();
    Ok(User {
        uid,
        gid: primary,
        additional_gids,
        home,
    })
}

/// A number of digits alone: no sign, no space. The largest means "unchanged" to the kernel, and is no user.
fn parse_id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .filter(|&id| id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/sh\nbroken\n77:x:5:5:n:/n:/n\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nlog:x:4:syslog,web\nlog2:x:4:web\n";

    fn user(spec: &str) -> (u32, u32, Vec<u32>) {
        let user = resolve(spec, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional_gids)
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(user(""), (0, 0, vec![]));
        assert_eq!(user("web"), (33, 34, vec![4]));
        assert_eq!(user("33"), (33, 34, vec![4]));
        assert_eq!(user("1234"), (1234, 0, vec![]));
        assert_eq!(user("web:log"), (33, 4, vec![]));
        assert_eq!(user("1234:4321"), (1234, 4321, vec![]));
        assert_eq!(user(":log"), (0, 4, vec![]));
        assert_eq!(user("77"), (5, 5, vec![]));
        assert_eq!(
            resolve("web", PASSWD, GROUP).unwrap().home.as_deref(),
            Some("/srv")
        );
    }

    #[test]
    fn what_is_neither_is_an_error_that_names_it() {
        for spec in [
            "nobody",
            "-1",
            "+1",
            "4294967295",
            "4294967296",
            "1 ",
            "root:nogroup",
            "0:-1",
        ] {
            assert!(
                matches!(resolve(spec, PASSWD, GROUP), Err(Error::NoSuchUser { .. })),
                "{spec}"
            );
        }
    }

    #[test]
    fn an_image_without_databases_has_root_and_numbers() {
        assert_eq!(resolve("", "", "").unwrap().uid, 0);
        assert_eq!(resolve("7:8", "", "").unwrap().gid, 8);
        resolve("web", "", "").unwrap_err();
    }
}
