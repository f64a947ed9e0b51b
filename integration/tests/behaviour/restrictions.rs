//! What the workload may not do: sysctl, seccomp, cgroup limits.

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("sysctls_are_set", sysctls_are_set),
    ("seccomp_denies_what_it_names", seccomp_denies_what_it_names),
    (
        "seccomp_works_with_new_privileges_allowed",
        seccomp_works_with_new_privileges_allowed,
    ),
    ("pids_limit_holds", pids_limit_holds),
    (
        "memory_limit_is_seen_and_holds",
        memory_limit_is_seen_and_holds,
    ),
    ("unlisted_devices_are_refused", unlisted_devices_are_refused),
];

fn sysctls_are_set(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["sysctl"] =
        json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_default_ttl": "99"});
    bundle.script("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_default_ttl");
    ensure_eq!(fixture.run(&bundle)?.success()?.stdout, "1\n99\n", "values");
    Ok(())
}

fn seccomp_profile() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 12, "op": "SCMP_CMP_EQ"}]},
        ],
    })
}

fn seccomp_denies_what_it_names(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["seccomp"] = seccomp_profile();
    bundle.spec["process"]["noNewPrivileges"] = json!(true);
    bundle.script(
        "mkdir /tmp/d; kill -10 $$ && echo allowed; kill -12 $$; grep -E '^Seccomp:' /proc/self/status",
    );
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.stderr.contains("Operation not supported"),
        "errno 95 is missing: {:?}",
        outcome.stderr
    );
    ensure!(
        outcome.stderr.contains("Operation not permitted"),
        "EPERM is missing: {:?}",
        outcome.stderr
    );
    ensure_eq!(outcome.stdout, "allowed\nSeccomp:\t2\n", "stdout");
    Ok(())
}

fn seccomp_works_with_new_privileges_allowed(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["seccomp"] = seccomp_profile();
    bundle.spec["process"]["noNewPrivileges"] = json!(false);
    bundle.script("mkdir /tmp/d; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status");
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.stderr.contains("Operation not supported"),
        "stderr: {:?}",
        outcome.stderr
    );
    ensure_eq!(outcome.stdout, "NoNewPrivs:\t0\nSeccomp:\t2\n", "stdout");
    Ok(())
}

fn pids_limit_holds(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": 8});
    bundle.script("for n in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; echo all");
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.stderr.contains("can't fork")
            || outcome.stderr.contains("Resource temporarily unavailable"),
        "twelve processes fit into a limit of eight: {:?} {:?}",
        outcome.stdout,
        outcome.stderr
    );
    Ok(())
}

fn memory_limit_is_seen_and_holds(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 48 << 20});
    bundle.mount(json!({"destination": "/fill", "type": "tmpfs", "source": "tmpfs", "options": ["size=512m"]}));
    // Pages of a tmpfs count as the writer's memory and cannot be reclaimed without swap.
    bundle.script("dd if=/dev/zero of=/fill/file bs=1M count=200; echo survived");
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.code() == 137 || !outcome.stderr.contains("200+0 records out"),
        "200 MiB fit into a limit of 48 MiB: {:?} {:?}",
        outcome.stdout,
        outcome.stderr
    );
    Ok(())
}

fn unlisted_devices_are_refused(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let capabilities = json!(["CAP_MKNOD"]);
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    bundle.spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    // 1:1 is /dev/mem, 1:3 is /dev/null, one of the spec's default devices.
    bundle.script(
        "mknod /tmp/mem c 1 1 && cat /tmp/mem > /dev/null; echo fine > /dev/null && echo null",
    );
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.stderr.contains("Operation not permitted"),
        "stderr: {:?}",
        outcome.stderr
    );
    ensure_eq!(outcome.stdout, "null\n", "stdout");
    Ok(())
}
