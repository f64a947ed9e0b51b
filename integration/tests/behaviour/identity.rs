//! Who and where the workload is: users, groups, capabilities, names, namespaces.

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "user_and_groups_are_the_bundles",
        user_and_groups_are_the_bundles,
    ),
    ("umask_is_the_bundles", umask_is_the_bundles),
    ("hostname_is_the_bundles", hostname_is_the_bundles),
    (
        "capabilities_are_exactly_the_bundles",
        capabilities_are_exactly_the_bundles,
    ),
    (
        "an_ambient_capability_that_cannot_be_is_told",
        an_ambient_capability_that_cannot_be_is_told,
    ),
    (
        "an_ordinary_user_has_no_capabilities",
        an_ordinary_user_has_no_capabilities,
    ),
    ("no_new_privileges_is_set", no_new_privileges_is_set),
    (
        "pid_namespace_hides_other_processes",
        pid_namespace_hides_other_processes,
    ),
    (
        "network_namespace_has_only_a_loopback_that_is_up",
        network_namespace_has_only_a_loopback_that_is_up,
    ),
    ("user_namespace_maps_root", user_namespace_maps_root),
    ("oom_score_is_set", oom_score_is_set),
];

fn user_and_groups_are_the_bundles(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7]});
    bundle.script("id -u; id -g; id -G");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "1000\n1001\n1001 5 7\n",
        "uid, gid, groups"
    );
    Ok(())
}

fn umask_is_the_bundles(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 0o027});
    bundle.script("umask; touch /tmp/file; stat -c %a /tmp/file");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "0027\n640\n",
        "umask and a file's mode"
    );
    Ok(())
}

fn hostname_is_the_bundles(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["hostname"] = json!("a-name-of-its-own");
    bundle.spec["domainname"] = json!("example.test");
    bundle.script("hostname; cat /proc/sys/kernel/domainname");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "a-name-of-its-own\nexample.test\n",
        "names"
    );
    Ok(())
}

fn capabilities_are_exactly_the_bundles(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let given = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": given, "effective": given, "permitted": given});
    bundle.script("grep ^Cap /proc/self/status");
    // Bits 0, 5 and 10 of linux/capability.h; nothing inheritable, nothing ambient.
    let expected = "CapInh:\t0000000000000000\nCapPrm:\t0000000000000421\nCapEff:\t0000000000000421\n\
                    CapBnd:\t0000000000000421\nCapAmb:\t0000000000000000\n";
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        expected,
        "capability sets"
    );
    Ok(())
}

fn an_ambient_capability_that_cannot_be_is_told(fixture: &Fixture) -> Claim {
    let given = json!(["CAP_CHOWN", "CAP_KILL"]);
    let warned = "can't raise ambient capability CAP_KILL";
    for (inheritable, is_told) in [(json!(["CAP_CHOWN"]), true), (json!([]), false)] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["process"]["capabilities"] = json!({
            "bounding": given, "effective": given, "permitted": given,
            "inheritable": inheritable, "ambient": given,
        });
        bundle.script("grep ^CapAmb /proc/self/status");
        let outcome = fixture.run(&bundle)?.success()?;
        // CAP_CHOWN is bit 0.
        let expected = format!("CapAmb:\t{:016x}\n", u64::from(is_told));
        ensure_eq!(outcome.stdout, expected, "ambient capabilities");
        ensure_eq!(outcome.stderr.contains(warned), is_told, "{outcome:?}");
    }
    Ok(())
}

fn an_ordinary_user_has_no_capabilities(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    bundle.script("grep -E '^Cap(Prm|Eff|Inh|Amb)' /proc/self/status | cut -f2 | sort -u");
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(outcome.stdout, "0000000000000000\n", "capability sets");
    Ok(())
}

fn no_new_privileges_is_set(fixture: &Fixture) -> Claim {
    for asked in [true, false] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["process"]["noNewPrivileges"] = json!(asked);
        bundle.script("grep ^NoNewPrivs /proc/self/status | cut -f2");
        let expected = if asked { "1\n" } else { "0\n" };
        ensure_eq!(
            fixture.run(&bundle)?.success()?.stdout,
            expected,
            "NoNewPrivs"
        );
    }
    Ok(())
}

fn pid_namespace_hides_other_processes(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo $$; for entry in /proc/[0-9]*; do echo ${entry#/proc/}; done | wc -l");
    let outcome = fixture.run(&bundle)?.success()?;
    let mut lines = outcome.stdout.lines();
    ensure_eq!(lines.next(), Some("1"), "the workload's own pid");
    let processes: u32 = lines.next().unwrap_or_default().trim().parse()?;
    ensure!(
        processes <= 3,
        "{processes} processes are seen, of which only the shell and wc are its own"
    );
    Ok(())
}

fn network_namespace_has_only_a_loopback_that_is_up(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("ls /sys/class/net; cat /sys/class/net/lo/flags; ip -o addr show dev lo | grep -c 127.0.0.1");
    let outcome = fixture.run(&bundle)?.success()?;
    // IFF_UP | IFF_LOOPBACK.
    ensure_eq!(
        outcome.stdout,
        "lo\n0x9\n1\n",
        "devices, flags of lo, its addresses"
    );
    Ok(())
}

fn user_namespace_maps_root(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    bundle.spec["linux"]["uidMappings"] = map.clone();
    bundle.spec["linux"]["gidMappings"] = map;
    let rootfs = bundle.in_rootfs("");
    std::os::unix::fs::chown(&rootfs, Some(100_000), Some(100_000))?;
    for dir in ["tmp", "bin", "proc", "dev", "sys"] {
        std::os::unix::fs::chown(rootfs.join(dir), Some(100_000), Some(100_000))?;
    }
    open_to_all(fixture.dir())?;
    open_to_all(bundle.dir())?;
    bundle.script("id -u; tr -s ' ' < /proc/self/uid_map; touch /tmp/file && stat -c %u /tmp/file");
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "0\n 0 100000 65536\n0\n",
        "uid, map, owner seen inside"
    );
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(rootfs.join("tmp/file"))?);
    ensure_eq!(owner, 100_000, "owner seen on the host");
    Ok(())
}

fn open_to_all(dir: &std::path::Path) -> std::io::Result<()> {
    std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))
}

fn oom_score_is_set(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["oomScoreAdj"] = json!(321);
    bundle.args(&["/bin/cat", "/proc/self/oom_score_adj"]);
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "321\n",
        "oom_score_adj"
    );
    Ok(())
}
