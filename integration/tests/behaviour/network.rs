//! The container's network: a namespace that somebody else set up, interfaces that a hook or the bundle brings, and
//! traffic both ways.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use integration::network::{Cable, INSIDE, LINK_ADDRESS, OUTSIDE};
use integration::{Bundle, Claim, Fixture, Model, ensure, ensure_eq, wait_with_limit};
use serde_json::json;

use crate::Entry;
use crate::lifecycle::create;

pub const CLAIMS: &[Entry] = &[
    ("the_given_network_is_joined", the_given_network_is_joined),
    ("a_server_inside_is_reached", a_server_inside_is_reached),
    ("a_server_outside_is_reached", a_server_outside_is_reached),
    (
        "a_limit_on_the_interfaces_rate_holds",
        a_limit_on_the_interfaces_rate_holds,
    ),
    ("a_hook_brings_the_network", a_hook_brings_the_network),
    (
        "network_devices_of_the_bundle_move_in",
        network_devices_of_the_bundle_move_in,
    ),
    (
        "the_network_namespace_is_given_back",
        the_network_namespace_is_given_back,
    ),
];

/// Claims about what only a machine has: tap devices.
pub const MICROVM_CLAIMS: &[Entry] = &[
    (
        "a_restored_machine_has_its_network_or_is_none",
        a_restored_machine_has_its_network_or_is_none,
    ),
    (
        "a_network_that_a_machine_has_is_refused_to_another",
        a_network_that_a_machine_has_is_refused_to_another,
    ),
    (
        "an_interface_that_is_no_ethernet_is_refused",
        an_interface_that_is_no_ethernet_is_refused,
    ),
    (
        "the_hosts_own_network_is_refused",
        the_hosts_own_network_is_refused,
    ),
];

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cable for the claim; none where ip(8) cannot make it.
fn cable(fixture: &Fixture) -> Result<Option<Cable>, Box<dyn std::error::Error + Send + Sync>> {
    if Command::new("ip").arg("-V").output().is_err() {
        println!("skipped: no ip(8) (package iproute2) here");
        return Ok(None);
    }
    Ok(Some(Cable::new(&fixture.id("net"))?))
}

/// A bundle in the cable's namespace that may send what ping sends.
fn bundle_in(fixture: &Fixture, cable: &Cable) -> io::Result<Bundle> {
    let mut bundle = fixture.bundle()?;
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(cable.path());
        }
    }
    allow_ping(&mut bundle);
    Ok(bundle)
}

fn allow_ping(bundle: &mut Bundle) {
    for set in ["bounding", "effective", "permitted"] {
        let set = bundle.spec["process"]["capabilities"][set].as_array_mut();
        set.into_iter()
            .for_each(|set| set.push(json!("CAP_NET_RAW")));
    }
}

fn the_given_network_is_joined(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "7"});
    bundle.script(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -o addr show dev eth0 | awk '{ print $4 }' | \
         grep -v ^fe80: | sort; ip route | sed 's/ *$//' | sort; ip -6 route | grep -c '^default via fd99::1'; \
         ip -o link show lo | grep -c ,UP",
    );
    let expected = format!(
        "7\n{LINK_ADDRESS}\n1400\n10.99.0.2/24\nfd99::2/64\n10.99.0.0/24 dev eth0 scope link  src {INSIDE}\n\
         192.0.2.0/24 via {OUTSIDE} dev eth0  metric 50\ndefault via {OUTSIDE} dev eth0\n1\n1\n"
    );
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        expected,
        "the network inside"
    );
    for host in [OUTSIDE, "192.0.2.1", "fd99::1"] {
        bundle.args(&["/bin/ping", "-c", "1", "-w", "20", host]);
        let outcome = fixture.run(&bundle)?;
        ensure_eq!(
            outcome.code(),
            0,
            "ping {host}: {} {}",
            outcome.stdout,
            outcome.stderr
        );
    }
    Ok(())
}

/// Connects from outside as soon as somebody listens.
fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let begin = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                if begin.elapsed() > PATIENCE {
                    return Err(error);
                }
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Bytes of which no two of a kilobyte's distance are alike by chance.
fn bytes(count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| (index / 7 + index / 1000) as u8)
        .collect()
}

fn a_server_inside_is_reached(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.script("nc -l -p 9000 -e cat");
    for (host, size) in [(INSIDE, 8 << 20), ("fd99::2", 100_000)] {
        let address = SocketAddr::new(host.parse()?, 9000);
        // What comes back is read while the rest is sent: both windows are smaller than this.
        let echo = cable.outside_of(move || -> io::Result<bool> {
            let sent = bytes(size);
            let mut stream = connect(address)?;
            let mut writer = stream.try_clone()?;
            let data = sent.clone();
            let writing = thread::spawn(move || -> io::Result<()> {
                writer.write_all(&data)?;
                writer.shutdown(std::net::Shutdown::Write)
            });
            let mut received = Vec::new();
            stream.read_to_end(&mut received)?;
            let written = writing.join();
            written.map_err(|_| io::Error::other("the writer panicked"))??;
            Ok(received == sent)
        })?;
        let outcome = fixture.run(&bundle)?;
        let echoed = echo.join().map_err(|_| "the client panicked")???;
        ensure!(
            echoed,
            "{host} sent something else back than it got: {:?}",
            outcome.stderr
        );
    }
    Ok(())
}

fn a_server_outside_is_reached(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.script(
        "head -c 3000000 /dev/zero | nc 10.99.0.1 9001; nc fd99::1 9001 < /dev/null | wc -c",
    );
    let server = cable.outside_of(|| -> io::Result<(usize, usize)> {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 9001))?;
        let mut received = Vec::new();
        listener.accept()?.0.read_to_end(&mut received)?;
        let (mut stream, _) = listener.accept()?;
        let sent = bytes(2_000_000);
        stream.write_all(&sent)?;
        Ok((received.len(), sent.len()))
    })?;
    let outcome = fixture.run(&bundle)?.success()?;
    let (received, sent) = server.join().map_err(|_| "the server panicked")???;
    ensure_eq!(received, 3_000_000, "bytes from the container");
    ensure_eq!(
        outcome.stdout.trim(),
        sent.to_string(),
        "bytes to the container"
    );
    Ok(())
}

/// As CNI's `bandwidth` plugin sets one: a queue of the interface's other end, through which all must go that arrives.
fn a_limit_on_the_interfaces_rate_holds(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let peer = ["dev", "peer-eth0"];
    let limit = ["rate", "400mbit", "burst", "1mb", "latency", "400ms"];
    let add = [&["tc", "qdisc", "add"], &peer[..], &["root", "tbf"], &limit].concat();
    if let Err(reason) = cable.output_outside(&add) {
        println!("skipped: no token bucket filter (sch_tbf) here: {reason}");
        return Ok(());
    }
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.script("nc 10.99.0.1 9001 < /dev/null | wc -c");
    let server = cable.outside_of(|| -> io::Result<()> {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 9001))?;
        listener.accept()?.0.write_all(&bytes(2_000_000))
    })?;
    let outcome = fixture.run(&bundle)?.success()?;
    server.join().map_err(|_| "the server panicked")???;
    ensure_eq!(outcome.stdout, "2000000\n", "bytes to the container");
    let show = [&["tc", "-s", "-j", "qdisc", "show"], &peer[..]].concat();
    let queues: serde_json::Value = serde_json::from_str(&cable.output_outside(&show)?)?;
    ensure!(
        queues[0]["kind"] == "tbf" && queues[0]["bytes"].as_u64() >= Some(2_000_000),
        "they did not go through the limit: {queues}"
    );
    Ok(())
}

/// As docker does it: the namespace is new, and a hook puts the interface there.
fn a_hook_brings_the_network(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = fixture.bundle()?;
    allow_ping(&mut bundle);
    let namespace = cable.path();
    let namespace = namespace.file_name().unwrap_or_default().to_string_lossy();
    let hook = |script: String| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]);
    bundle.spec["hooks"] = json!({"createRuntime": hook(format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/') && ip -n {namespace} link set eth0 netns $pid && \
         nsenter -t $pid -n sh -c 'ip addr add 10.99.0.2/24 dev eth0 && ip link set eth0 up && \
         ip route add default via {OUTSIDE}'"
    ))});
    bundle.script("ip -o addr show dev eth0 | grep -c 10.99.0.2/24; ping -q -c 1 -w 20 192.0.2.1 > /dev/null; echo $?");
    let outcome = fixture.run(&bundle)?;
    outcome.expect("the network that a hook made", "1\n0\n", "", 0)
}

fn network_devices_of_the_bundle_move_in(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    // From the namespace of this process, which is where `rt` looks for them.
    let name = format!(
        "rt{}{}",
        std::process::id() % 100_000,
        fixture.model().name().len()
    );
    let outside = format!("{name}p");
    cable.ip_inside(&[
        "link", "add", &outside, "type", "veth", "peer", "name", &name,
    ])?;
    cable.ip_inside(&[
        "link",
        "set",
        &name,
        "netns",
        &std::process::id().to_string(),
    ])?;
    let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status();
    ip(&["addr", "add", "10.98.0.2/24", "dev", &name])?;
    cable.ip_inside(&["addr", "add", "10.98.0.1/24", "dev", &outside])?;
    cable.ip_inside(&["link", "set", &outside, "up"])?;
    let mut bundle = fixture.bundle()?;
    allow_ping(&mut bundle);
    bundle.spec["linux"]["netDevices"] = json!({ name.as_str(): {"name": "eth7"} });
    bundle.script("ip -o addr show dev eth7 | grep -c 10.98.0.2/24; ping -q -c 1 -w 20 10.98.0.1 > /dev/null; echo $?");
    let outcome = fixture.run(&bundle)?;
    ensure!(
        !std::path::Path::new("/sys/class/net").join(&name).exists(),
        "the device stayed on the host"
    );
    outcome.expect("the device that moved in", "1\n0\n", "", 0)
}

/// What a container leaves in a namespace that outlives it: nothing, however it ended.
fn the_network_namespace_is_given_back(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let looks = || -> io::Result<String> {
        let disciplines = cable.output_inside(&["tc", "qdisc", "show"])?;
        Ok(disciplines + &cable.output_inside(&["ip", "-o", "link"])?)
    };
    let before = looks()?;
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.args(&["/bin/ping", "-c", "1", "-w", "20", OUTSIDE]);
    fixture.run(&bundle)?.success()?;
    ensure_eq!(looks()?, before, "the namespace after a container");
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("killed");
    create(fixture, &bundle, &id)?;
    if fixture.model() == Model::Microvm {
        ensure!(looks()? != before, "the machine has no tap device");
    }
    let pid = fixture.state(&id)?["pid"].as_i64().unwrap_or(0);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    fixture.wait_for_end(&id)?;
    // The next one finds what is left, and is not disturbed.
    bundle.args(&["/bin/ping", "-c", "1", "-w", "20", OUTSIDE]);
    fixture.run(&bundle)?.success()?;
    fixture.call(&["delete", "--force", &id])?.success()?;
    ensure_eq!(
        looks()?,
        before,
        "the namespace after a container that was killed"
    );
    Ok(())
}

fn a_network_that_a_machine_has_is_refused_to_another(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("first");
    fixture.start_detached(&bundle, &id)?;
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 1, "exit code");
    ensure!(
        outcome.stderr.contains("eth0") && outcome.stderr.contains("another microVM uses it"),
        "{}",
        outcome.stderr
    );
    // The first one goes on.
    let ping = ["exec", &id, "/bin/ip", "-o", "addr", "show", "dev", "eth0"];
    ensure!(
        fixture.call(&ping)?.success()?.stdout.contains(INSIDE),
        "the first machine lost its network"
    );
    Ok(())
}

fn an_interface_that_is_no_ethernet_is_refused(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    cable.ip_inside(&["tuntap", "add", "dev", "vpn0", "mode", "tun"])?;
    cable.ip_inside(&["link", "set", "vpn0", "up"])?;
    let bundle = bundle_in(fixture, &cable)?;
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 1, "exit code");
    ensure!(
        outcome.stderr.contains("vpn0") && outcome.stderr.contains("--isolation container"),
        "{}",
        outcome.stderr
    );
    Ok(())
}

fn the_hosts_own_network_is_refused(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace["path"] = json!("/proc/1/ns/net");
        }
    }
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 1, "exit code");
    ensure!(
        outcome.stderr.contains("/proc/1/ns/net")
            && outcome.stderr.contains("the host's own network"),
        "{}",
        outcome.stderr
    );
    Ok(())
}

fn a_restored_machine_has_its_network_or_is_none(fixture: &Fixture) -> Claim {
    let Some(cable) = cable(fixture)? else {
        return Ok(());
    };
    let mut bundle = bundle_in(fixture, &cable)?;
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("restored");
    fixture.start_detached(&bundle, &id)?;
    let images = fixture.dir().join("images");
    let images = images.to_str().ok_or("a path that is not UTF-8")?;
    fixture
        .call(&["checkpoint", "--image-path", images, &id])?
        .success()?;
    let restore = || -> io::Result<String> {
        let log = fixture.dir().join("restore.log");
        let file = std::fs::File::create(&log)?;
        let mut restore = fixture.rt(&["restore", "--detach", "--image-path", images, "--bundle"]);
        restore.arg(bundle.dir()).arg(&id);
        restore.stdout(file.try_clone()?).stderr(file);
        wait_with_limit(&mut restore.spawn()?, Duration::from_secs(120))?;
        std::fs::read_to_string(log)
    };
    ensure_eq!(restore()?, "", "what the restore says");
    let ping = [
        "exec",
        &id,
        "/bin/ping",
        "-q",
        "-c",
        "1",
        "-w",
        "20",
        OUTSIDE,
    ];
    fixture.call(&ping)?.success()?;
    fixture.call(&["delete", "--force", &id])?.success()?;
    cable.ip_inside(&["addr", "add", "10.99.7.7/24", "dev", "eth0"])?;
    let refused = restore()?;
    ensure!(
        refused.contains("another network: interfaces, addresses or routes differ"),
        "{refused}"
    );
    ensure_eq!(
        fixture.call(&["state", &id])?.code(),
        1,
        "exit code of state"
    );
    Ok(())
}
