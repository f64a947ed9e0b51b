//! The lifecycle, checked by machine: every order in which a few commands, their crashes, and what their containers do
//! can follow one another.
//!
//! `model.rs` is the state machine and says what must hold, `checker.rs` walks all of its states. A model proves nothing
//! about code that does something else. So its decisions are the code's own, its steps are compared with those that
//! `rt` takes (`conformance.rs`), and each property is seen to fail for a lifecycle with a flaw.

mod checker;
mod conformance;
mod model;

use checker::explore;
use model::{Action, Command, Flaw, Lifecycle, Property, World};
use runtime::state::Status;

const COMMANDS: [Command; 7] = [
    Command::Create,
    Command::Start,
    Command::Pause,
    Command::Resume,
    Command::Kill,
    Command::Delete { force: false },
    Command::Delete { force: true },
];

/// What the commands come upon: nothing, and a container of each status.
fn beginnings() -> Vec<World> {
    use Command::{Create, Kill, Pause, Start};
    let ways: [&[Command]; 5] = [
        &[],
        &[Create],
        &[Create, Start],
        &[Create, Start, Pause],
        &[Create, Start, Kill],
    ];
    ways.into_iter().map(after).collect()
}

/// The world after these commands, one after the other, undisturbed.
fn after(commands: &[Command]) -> World {
    let lifecycle = Lifecycle { flaw: None };
    let mut world = World::new(&[], 0);
    for command in commands {
        world = world.with(&[*command], 0);
        while let Some(next) = lifecycle.after(&world, Action::Go(0)) {
            world = next;
        }
        let next = lifecycle.next_states(&world).into_iter();
        if let Some((_, begun)) = next
            .last()
            .filter(|(action, _)| matches!(action, Action::Begin(_)))
        {
            world = begun;
        }
    }
    world
}

/// Every choice of `count` commands, in no order.
fn choices(count: usize) -> Vec<Vec<Command>> {
    let mut choices = vec![(0, Vec::new())];
    for _ in 0..count {
        choices = choices
            .into_iter()
            .flat_map(|(first, chosen)| {
                (first..COMMANDS.len()).map(move |index| {
                    let more = chosen.iter().copied().chain([COMMANDS[index]]);
                    (index, more.collect())
                })
            })
            .collect();
    }
    choices.into_iter().map(|(_, chosen)| chosen).collect()
}

/// `count` commands at once, of which some may be killed, in each beginning.
fn worlds(count: usize, crashes: u8) -> Vec<World> {
    let choices = choices(count);
    let in_each = |world: World| {
        choices
            .iter()
            .map(move |chosen| world.with(chosen, crashes))
    };
    beginnings().into_iter().flat_map(in_each).collect()
}

fn check(begin: Vec<World>) {
    let findings = explore(Lifecycle { flaw: None }, begin, None);
    println!("{} states", findings.states);
    for (property, counterexample) in &findings.broken {
        println!("{property:?} does not hold: {counterexample}");
    }
    assert!(findings.broken.is_empty());
}

#[test]
fn the_beginnings_are_one_of_each_status() {
    let told: Vec<_> = beginnings().iter().map(World::told).collect();
    let statuses = [
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Stopped,
    ];
    let expected: Vec<_> = [None].into_iter().chain(statuses.map(Some)).collect();
    assert_eq!(told, expected);
}

#[test]
fn two_commands_at_once_and_both_may_be_killed() {
    check(worlds(2, 2));
}

#[test]
fn three_commands_at_once_and_one_may_be_killed() {
    check(worlds(3, 1));
}

/// A property that no lifecycle breaks would say nothing.
#[test]
fn every_flaw_is_found() {
    let flaws = [
        (Flaw::RecordAfterProcess, Property::NothingWithoutRecord),
        (Flaw::RecordRemovedFirst, Property::NothingWithoutRecord),
        (Flaw::StartUnannounced, Property::StateIsTrue),
        (Flaw::PauseUnannounced, Property::StateIsTrue),
        (Flaw::AnswerWritten, Property::StateIsTrue),
        (Flaw::FailedStartIsCreated, Property::StateIsTrue),
        (Flaw::LockNotLookedAt, Property::OwnContainer),
        (Flaw::PidAlone, Property::OwnContainer),
        (Flaw::ProcessOutlivesCreator, Property::StateIsTrue),
        (Flaw::NoSweep, Property::DeleteLeavesNothing),
        (Flaw::NoLock, Property::StartedOnce),
        (Flaw::LockOfTheDead, Property::EveryCommandEnds),
    ];
    for (flaw, property) in flaws {
        let lifecycle = Lifecycle { flaw: Some(flaw) };
        let broken = explore(lifecycle, worlds(3, 1), Some(property)).broken;
        assert!(
            broken.contains_key(&property),
            "{flaw:?} does not break {property:?}"
        );
    }
}
