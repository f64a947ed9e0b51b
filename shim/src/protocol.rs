//! The task service as the protocol has it: each method's message is taken apart no further than for whom it is.

use containerd_shim_protos::Task;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::ttrpc::{self, TtrpcContext};

use crate::service::{Reply, Service};

/// Answers a method of the protocol, and logs why it was refused.
pub fn answer<T>(method: &str, reply: Reply<T>) -> ttrpc::Result<T> {
    reply.map_err(|failure| {
        tracing::debug!("{method}: {failure}");
        failure.into()
    })
}

impl Task for Service {
    fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        answer("state", Service::state(self, &request))
    }

    fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        answer("create", Service::create(self, &request))
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        answer("start", Service::start(self, &request))
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        answer("delete", Service::delete(self, &request))
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        answer("pids", Service::pids(self, &request))
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        answer("pause", Service::pause(self, &request.id, true)).map(|()| Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        answer("resume", Service::pause(self, &request.id, false)).map(|()| Empty::new())
    }

    fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        answer("checkpoint", Service::checkpoint(self, &request)).map(|()| Empty::new())
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        answer("kill", Service::kill(self, &request)).map(|()| Empty::new())
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        answer("exec", Service::exec(self, &request)).map(|()| Empty::new())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let mut state = self.tasks.lock();
        let resized = state
            .process(&request.id, &request.exec_id)
            .and_then(|process| process.resize(request.width, request.height));
        answer("resize", resized).map(|()| Empty::new())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let mut state = self.tasks.lock();
        let process = state.process(&request.id, &request.exec_id);
        let closed = process.map(|process| {
            if request.stdin {
                process.close_stdin();
            }
        });
        answer("close", closed).map(|()| Empty::new())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        answer("update", Service::update(self, &request)).map(|()| Empty::new())
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        answer("wait", Service::wait(self, &request))
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        answer("stats", Service::stats(self, &request))
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        answer("connect", Service::connect(self, &request))
    }

    fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let done = match request.now {
            // Only our own `delete` asks so.
            true => self.give_up(&request.id),
            false => {
                Service::shutdown(self);
                Ok(())
            }
        };
        answer("shutdown", done).map(|()| Empty::new())
    }
}
