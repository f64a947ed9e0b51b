//! containerd's sandbox service: a pod whose sandbox we make ourselves, without an image (`sandboxer = "shim"`).
//!
//! To the lifecycle a sandbox is a container like any other, so that both models make it as they make that of an image:
//! in the microVM model it is what the pod's machine boots for. It is asked for here and not by the task service, has no
//! streams, and no events tell of it. The pod's other containers come by the task service of the same server, with the
//! sandbox's process as the name of its namespaces.

use std::env::consts;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::Sandbox;
use containerd_shim_protos::ttrpc::{self, TtrpcContext};
use runtime::bundle::CONFIG_FILE;
use runtime::signal::Signal;

use crate::cleanup::saved_options;
use crate::error::{Failure, Kind};
use crate::events::timestamp;
use crate::metrics;
use crate::pod::{Files, Pod, configuration};
use crate::process::Phase;
use crate::protocol::answer;
use crate::service::{New, Reply, Service};
use crate::stdio::Addresses;

/// How long a sandbox may take to end where containerd does not say.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// As the Container Runtime Interface calls the states of a sandbox.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

impl Service {
    fn make_sandbox(&self, request: &CreateSandboxRequest) -> Reply<()> {
        if !request.rootfs.is_empty() {
            let reason =
                "rootfs: a sandbox of this shim has no image and takes no root file system";
            return Err(Failure::new(Kind::Unsupported, reason));
        }
        let mut config = configuration(request.options.as_ref())?;
        config.annotations.extend(request.annotations.clone());
        let bundle = Path::new(&request.bundle_path);
        let options = saved_options(bundle);
        let files = Files::of(bundle);
        self.tasks.lock().enter_pod(Pod {
            id: request.sandbox_id.clone(),
            options: options.clone(),
            files: files.clone(),
            created: runtime::clock::now(),
        })?;
        let make = || {
            let program = engine::own_path().map_err(Failure::io("find this program"))?;
            let spec = files.sandbox(&request.sandbox_id, &config, &request.netns_path)?;
            files.make(&config, &program)?;
            let path = bundle.join(CONFIG_FILE);
            std::fs::write(&path, spec.to_string())
                .map_err(Failure::io(format_args!("write {}", path.display())))?;
            let new = New {
                id: &request.sandbox_id,
                bundle: &request.bundle_path,
                rootfs: &[],
                addresses: Addresses::default(),
                options,
                pod: None,
            };
            self.make(new, |_, _| {}).map(drop)
        };
        make().inspect_err(|_| self.leave_pod())
    }

    /// Forgets the pod, and removes its files.
    fn leave_pod(&self) {
        let pod = self.tasks.lock().leave_pod();
        if let Some(Err(failure)) = pod.map(|pod| pod.files.remove()) {
            tracing::warn!("{failure}");
        }
        self.end_if_over(&self.tasks.lock());
    }

    /// The pod, if its sandbox has this id.
    fn find_pod<T>(&self, id: &str, of: impl FnOnce(&Pod) -> T) -> Reply<T> {
        let state = self.tasks.lock();
        let pod = state.pod().filter(|pod| pod.id == id);
        pod.map(of).ok_or_else(|| Failure::not_found(id))
    }

    /// Ends all that runs in the pod.
    fn stop_pod(&self, id: &str, limit: Duration) -> Reply<()> {
        self.find_pod(id, |_| ())?;
        let mut all = self.tasks.lock().all();
        // The sandbox first: its machine or its pid namespace takes others along.
        all.sort_by_key(|(_, container)| container.as_str() != id);
        for (lifecycle, container) in all {
            if let Err(error) = lifecycle.kill(&container, Signal::KILL, true) {
                // It has ended.
                tracing::debug!("{container}: {}", runtime::error_chain(&error));
            }
        }
        self.tasks.wait(id, "", Some(limit)).map(drop)
    }

    /// Removes the pod with all that is left in it.
    pub fn remove_pod(&self, id: &str) -> Reply<()> {
        self.stop_pod(id, STOP_LIMIT)?;
        let mut all = self.tasks.lock().all();
        all.sort_by_key(|(_, container)| container.as_str() == id);
        for (_, container) in all {
            self.delete_container(container.as_str())?;
        }
        self.leave_pod();
        Ok(())
    }

    fn pod_status(&self, id: &str) -> Reply<SandboxStatusResponse> {
        let created = self.find_pod(id, |pod| pod.created)?;
        let mut state = self.tasks.lock();
        let process = state.process(id, "")?;
        let is_ready = process.phase == Phase::Running && process.exit.is_none();
        let mut response = SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            created_at: MessageField::some(timestamp(created)),
            ..Default::default()
        };
        match process.exit {
            Some(exit) => response.exited_at = MessageField::some(timestamp(exit.time)),
            None => response.pid = process.pid(),
        }
        Ok(response)
    }

    fn pod_metrics(&self, id: &str) -> Reply<SandboxMetricsResponse> {
        self.find_pod(id, |_| ())?;
        let (lifecycle, container) = self.lifecycle(id)?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = id.to_owned();
        metrics.timestamp = MessageField::some(timestamp(runtime::clock::now()));
        metrics.data = MessageField::some(metrics::of(&lifecycle.stats(&container)?));
        Ok(response)
    }
}

impl Sandbox for Service {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let made = self.make_sandbox(&request);
        answer("create sandbox", made).map(|()| CreateSandboxResponse::new())
    }

    fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let id = request.sandbox_id.as_str();
        let start = || {
            let created = self.find_pod(id, |pod| pod.created)?;
            let started = self.start_process(id, "")?;
            Ok(StartSandboxResponse {
                pid: started.pid,
                created_at: MessageField::some(timestamp(created)),
                ..Default::default()
            })
        };
        answer("start sandbox", start())
    }

    fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = consts::OS.to_owned();
        // As Go names it.
        platform.architecture = match consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(response)
    }

    fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let limit = match request.timeout_secs {
            0 => STOP_LIMIT,
            seconds => Duration::from_secs(seconds.into()),
        };
        let stopped = self.stop_pod(&request.sandbox_id, limit);
        answer("stop sandbox", stopped).map(|()| StopSandboxResponse::new())
    }

    fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let id = request.sandbox_id.as_str();
        let ended = self
            .find_pod(id, |_| ())
            .and_then(|()| self.tasks.wait(id, "", None));
        answer("wait for sandbox", ended).map(|exit| WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.time)),
            ..Default::default()
        })
    }

    fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        answer("sandbox status", self.pod_status(&request.sandbox_id))
    }

    fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let found = self.find_pod(&request.sandbox_id, |_| ());
        answer("ping sandbox", found).map(|()| PingResponse::new())
    }

    fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let removed = match self.remove_pod(&request.sandbox_id) {
            // It could not be made, or is gone already.
            Err(failure) if failure.kind == Kind::NotFound => Ok(()),
            removed => removed,
        };
        if removed.is_ok() {
            self.shutdown_with_last();
        }
        answer("shut sandbox down", removed).map(|()| ShutdownSandboxResponse::new())
    }

    fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        answer("sandbox metrics", self.pod_metrics(&request.sandbox_id))
    }
}
