//! Limits: what reaches the kernel, and what is refused by its name.

use std::fs;

use engine::Cgroup;
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use crate::Test;
use crate::fixture::Container;

pub const TESTS: &[Test] = &[
    (
        "every_limit_reaches_the_kernel",
        every_limit_reaches_the_kernel,
    ),
    ("an_update_keeps_the_rest", an_update_keeps_the_rest),
    (
        "what_cannot_be_honoured_is_refused_by_name",
        what_cannot_be_honoured_is_refused_by_name,
    ),
    (
        "usage_is_checked_before_an_update",
        usage_is_checked_before_an_update,
    ),
    ("device_rules_hold", device_rules_hold),
    ("no_pids_is_no_fork", no_pids_is_no_fork),
    (
        "a_missing_parent_is_made_and_a_tree_removed",
        a_missing_parent_is_made_and_a_tree_removed,
    ),
];

struct Group(Cgroup);

impl Group {
    fn new(name: &str) -> Self {
        let path = format!("/rt-test-{name}-{}", std::process::id());
        let cgroup = Cgroup::new(path.as_ref()).unwrap();
        cgroup.create().unwrap();
        Self(cgroup)
    }

    fn apply(&self, resources: &Value) -> Result<(), engine::cgroup::Error> {
        let resources: LinuxResources = serde_json::from_value(resources.clone()).unwrap();
        self.0.apply(&resources)
    }

    /// A file of a controller, of whatever version has it.
    fn read(&self, controller: &str, file: &str) -> Option<String> {
        let layout = self.0.layout();
        let hierarchy = layout.v1(controller).or(layout.unified())?;
        let relative = self.0.path().strip_prefix("/").unwrap();
        let text = fs::read_to_string(hierarchy.mount.join(relative).join(file)).ok()?;
        Some(text.trim_end().to_owned())
    }

    fn is_v1(&self, controller: &str) -> bool {
        self.0.layout().v1(controller).is_some()
    }

    fn has(&self, controller: &str) -> bool {
        let name = if controller == "blkio" {
            "io"
        } else {
            controller
        };
        let unified = self.read("no such controller", "cgroup.controllers");
        self.is_v1(controller)
            || unified.is_some_and(|all| all.split_whitespace().any(|one| one == name))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.remove().unwrap();
        assert!(!self.0.exists());
    }
}

fn every_limit_reaches_the_kernel() {
    let group = Group::new("all");
    // Controller, resources, and the files of version 1 and of version 2 with what is in them then.
    let loop_device = fs::metadata("/dev/loop0").is_ok();
    let cases = [
        (
            "cpu",
            json!({"cpu": {"shares": 512}}),
            "cpu.shares=512",
            "cpu.weight=59",
        ),
        (
            "cpu",
            json!({"cpu": {"quota": 50_000, "period": 200_000, "burst": 10_000}}),
            "cpu.cfs_quota_us=50000 cpu.cfs_period_us=200000 cpu.cfs_burst_us=10000",
            "cpu.max=50000_200000 cpu.max.burst=10000",
        ),
        (
            "cpu",
            json!({"cpu": {"idle": 1}}),
            "cpu.idle=1",
            "cpu.idle=1",
        ),
        (
            "cpuset",
            json!({"cpu": {"cpus": "0", "mems": "0"}}),
            "cpuset.cpus=0 cpuset.mems=0",
            "cpuset.cpus=0 cpuset.mems=0",
        ),
        (
            "memory",
            json!({"memory": {"limit": 67_108_864, "reservation": 33_554_432, "useHierarchy": true}}),
            "memory.limit_in_bytes=67108864 memory.soft_limit_in_bytes=33554432 memory.use_hierarchy=1",
            "memory.max=67108864 memory.low=33554432",
        ),
        (
            "memory",
            json!({"memory": {"limit": -1}}),
            "",
            "memory.max=max",
        ),
        (
            "pids",
            json!({"pids": {"limit": 33}}),
            "pids.max=33",
            "pids.max=33",
        ),
        (
            "pids",
            json!({"pids": {"limit": -1}}),
            "pids.max=max",
            "pids.max=max",
        ),
        (
            "hugetlb",
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]}),
            "hugetlb.2MB.limit_in_bytes=4194304 hugetlb.2MB.rsvd.limit_in_bytes=4194304",
            "hugetlb.2MB.max=4194304 hugetlb.2MB.rsvd.max=4194304",
        ),
        (
            "net_cls",
            json!({"network": {"classID": 1_048_577}}),
            "net_cls.classid=1048577",
            "",
        ),
        (
            "blkio",
            match loop_device {
                true => json!({"blockIO": {
                    "throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 1_048_576}],
                    "throttleWriteIOPSDevice": [{"major": 7, "minor": 0, "rate": 99}]}}),
                false => json!({}),
            },
            match loop_device {
                true => {
                    "blkio.throttle.read_bps_device=7:0_1048576 blkio.throttle.write_iops_device=7:0_99"
                }
                false => "",
            },
            match loop_device {
                true => "io.max=7:0_rbps=1048576_wbps=max_riops=max_wiops=99",
                false => "",
            },
        ),
    ];
    for (controller, resources, v1, v2) in cases {
        if !group.has(controller) {
            println!("skipped: this system does not offer {controller} to {resources}");
            continue;
        }
        group.apply(&resources).unwrap();
        let expected = if group.is_v1(controller) { v1 } else { v2 };
        for one in expected.split_whitespace() {
            let (file, value) = one.split_once('=').unwrap();
            let found = group.read(controller, file).unwrap();
            assert_eq!(found, value.replace('_', " "), "{file} for {resources}");
        }
    }
    if group.has("memory") && !group.is_v1("memory") {
        group
            .apply(&json!({"unified": {"memory.high": "12288", "cgroup.max.depth": "3"}}))
            .unwrap();
        assert_eq!(group.read("memory", "memory.high").unwrap(), "12288");
        assert_eq!(group.read("", "cgroup.max.depth").unwrap(), "3");
    }
}

fn an_update_keeps_the_rest() {
    let group = Group::new("update");
    let bandwidth = |group: &Group| match group.is_v1("cpu") {
        true => format!(
            "{} {}",
            group.read("cpu", "cpu.cfs_quota_us").unwrap(),
            group.read("cpu", "cpu.cfs_period_us").unwrap()
        ),
        false => group.read("cpu", "cpu.max").unwrap(),
    };
    group
        .apply(&json!({"cpu": {"quota": 90_000, "period": 100_000, "burst": 80_000}}))
        .unwrap();
    group.apply(&json!({"cpu": {"period": 200_000}})).unwrap();
    assert_eq!(bandwidth(&group), "90000 200000");
    // The new quota is less than the old burst.
    group
        .apply(&json!({"cpu": {"quota": 40_000, "burst": 20_000}}))
        .unwrap();
    assert_eq!(bandwidth(&group), "40000 200000");
    group
        .apply(&json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}}))
        .unwrap();
    // Up with both, and down with both.
    for limit in [67_108_864, 16_777_216] {
        group
            .apply(&json!({"memory": {"limit": limit, "swap": limit}}))
            .unwrap();
    }
    assert_eq!(bandwidth(&group), "40000 200000");
}

fn what_cannot_be_honoured_is_refused_by_name() {
    let group = Group::new("refused");
    let mut cases = vec![
        (json!({"memory": {"kernel": 1 << 20}}), "memory.kernel"),
        (
            json!({"memory": {"limit": 2 << 20, "swap": 1 << 20}}),
            "memory.swap",
        ),
        (json!({"cpu": {"quota": 1}}), "cpu.quota"),
        (json!({"cpu": {"cpus": "4000"}}), "cpu.cpus"),
        (json!({"cpu": {"mems": "900"}}), "cpu.mems"),
        (
            json!({"blockIO": {"leafWeight": 100}}),
            "blockIO.leafWeight",
        ),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 0, "rate": 1}]}}),
            "blockIO.throttleReadBpsDevice[0]",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}),
            "hugepageLimits[0]",
        ),
        (json!({"rdma": {"none": {}}}), "rdma[\"none\"]"),
        (
            json!({"devices": [{"allow": true, "type": "c", "access": "x"}]}),
            "devices[0].access",
        ),
        (json!({"unified": {"cgroup.procs": "1"}}), "unified"),
        (json!({"unified": {"memory.none": "1"}}), "unified"),
        (
            json!({"network": {"priorities": [{"name": "none", "priority": 1}]}}),
            "network.priorities[0]",
        ),
    ];
    if !group.is_v1("memory") {
        cases.extend([
            (json!({"memory": {"swappiness": 1}}), "memory.swappiness"),
            (
                json!({"memory": {"disableOOMKiller": true}}),
                "memory.disableOOMKiller",
            ),
            (
                json!({"memory": {"kernelTCP": 1 << 20}}),
                "memory.kernelTCP",
            ),
            (
                json!({"memory": {"useHierarchy": false}}),
                "memory.useHierarchy",
            ),
            (json!({"memory": {"swap": 1 << 20}}), "memory.swap"),
            (
                json!({"cpu": {"realtimeRuntime": 1000}}),
                "cpu.realtimeRuntime",
            ),
            (json!({"network": {"classID": 1}}), "network.classID"),
            (json!({"blockIO": {"weight": 5}}), "blockIO.weight"),
        ]);
    }
    for (resources, field) in cases {
        let error = group.apply(&resources).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("linux.resources.{field}")),
            "{resources}: {error}"
        );
    }
}

fn usage_is_checked_before_an_update() {
    let container = Container::sleeping(|container| {
        container.config["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
    });
    let check = json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}});
    let check: LinuxResources = serde_json::from_value(check).unwrap();
    let error = container.cgroup.apply(&check).unwrap_err().to_string();
    assert!(error.starts_with("linux.resources.memory.limit"), "{error}");
    assert_eq!(container.cgroup.oom_kills().unwrap(), 0);
    let mut container = container;
    container.kill_and_delete();
}

fn device_rules_hold() {
    // tun can be opened by anybody who has its node.
    let script = "mknod /tmp/tun c 10 200; (: < /tmp/tun) && echo read; (: > /tmp/tun) && echo written; true";
    let run = |rules: Value| {
        let mut container = Container::shell(script);
        for set in ["bounding", "effective", "permitted"] {
            container.config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
        container.config["linux"]["resources"] = json!({"devices": rules});
        let wildcard = container.create();
        let layout = container.cgroup.layout().v1("devices").is_some();
        if let Err(error) = wildcard {
            return Err((layout, error.to_string()));
        }
        container.engine.start().unwrap();
        Ok(container.finish().stdout)
    };
    let tun = |allow: bool, minor: i64, access: &str| json!({"allow": allow, "type": "c", "major": 10, "minor": minor, "access": access});
    let none = json!({"allow": false, "access": "rwm"});
    assert_eq!(run(json!([none])).unwrap(), "");
    assert_eq!(run(json!([none, tun(true, 200, "r")])).unwrap(), "read\n");
    let last = json!([none, tun(true, 200, "rw"), tun(false, 200, "w")]);
    assert_eq!(run(last).unwrap(), "read\n");
    let all = json!([{"allow": true, "access": "rwm"}, tun(false, 200, "r")]);
    assert_eq!(run(all).unwrap(), "written\n");
    match run(json!([none, tun(true, -1, "rw"), tun(false, 200, "r")])) {
        Ok(text) => assert_eq!(text, "written\n"),
        Err((true, error)) => {
            assert!(error.starts_with("linux.resources.devices[2]: "), "{error}");
        }
        Err((false, error)) => panic!("{error}"),
    }
}

fn no_pids_is_no_fork() {
    let mut container = Container::shell("echo alone; (echo forked); echo never");
    container.config["linux"]["resources"] = json!({"pids": {"limit": 0}});
    let outcome = container.run();
    assert_eq!(outcome.stdout, "alone\n", "{outcome:?}");
}

fn a_missing_parent_is_made_and_a_tree_removed() {
    let parent = Group::new("parent");
    let below = Cgroup::new(&parent.0.path().join("a/b")).unwrap();
    below.create().unwrap();
    if parent.has("memory") {
        let limit = json!({"memory": {"limit": 33_554_432}});
        below
            .apply(&serde_json::from_value(limit).unwrap())
            .unwrap();
    }
    assert!(below.exists());
}
