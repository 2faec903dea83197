"""What a call of pack has to do in a folder that may hold shards already, and when it must refuse.

    nothing there              the inputs are cut into tasks
    the same packing           its own shards are the tasks: done ones stay, others are written
    another, by default        an error that lists what differs; nothing is touched
    another, with "append"     its shards stay in front, new inputs become shards behind them
    another, with "replace"    its shards are removed and the inputs are packed anew

A packing is identified by its inputs (source names and bytes) and its settings. A folder without a
manifest holds a packing that was killed: what its records name must be a part of what is asked for.
A shard is bound when the manifest names it, unbound when it has a record but no manifest names it;
a tar without either is loose.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model_factory.command_line.plain_text import show

from ..codec.framing import check_choice
from ..errors import DataPipelineError
from .existing import (
    Differences,
    Existing,
    KnownInput,
    known_inputs,
    read_existing,
    read_shard_record,
    refusal,
    remove_packing,
    remove_shards,
    setting_differences,
    tar_sources,
)
from .inputs import Input, Report
from .manifest import load_manifest
from .tasks import PackConfig, Task, default_samples_per_shard, list_tasks, shard_number
from .writer import only_here

MODES = ("refuse", "append", "replace")
SHARD_SIZE = "samples_per_shard"  # the one setting that changes no byte of a sample
PLAN_LOCK = ".pack.lock"


@dataclass(frozen=True)
class PackPlan:
    """Records of the shards that stay in front, and the tasks that follow them."""

    kept: tuple[dict, ...]
    tasks: tuple[Task, ...]


def plan_packing(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    num_jobs: int = 1,
    mode: str = "refuse",
    report: Report = show,
    is_array: bool = False,
) -> PackPlan:
    """Plan of packing these inputs into a folder, which is made; with mode "replace" the old shards
    are removed.

    Jobs that start at the same time wait for each other, so that one that replaces shards never
    removes what another has just written. With `is_array`, other jobs make the same plan at other
    times, so it does not depend on what any of them has finished. Raises DataPipelineError, with
    nothing changed, when the folder holds another packing.
    """
    check_choice("mode", mode, choices=MODES)
    output.mkdir(parents=True, exist_ok=True)
    with only_here(output / PLAN_LOCK):
        found = read_existing(output)
        planner = _Planner(
            inputs=_under_packed_names(inputs, found),
            asked=inputs,
            found=found,
            config=config,
            num_jobs=num_jobs,
            report=report,
        )
        if planner.found.damage is not None:
            report(f"{planner.found.damage}: it is written anew from the records of the shards")
        return planner.appended(is_array) if mode == "append" else planner.continued(mode)


@dataclass(frozen=True)
class _Planner:
    """Makes the plan of packing `inputs` into the folder where `found` lies. They have the names
    under which it holds them, `asked` those that they have now.
    """

    inputs: list[Input]
    asked: list[Input]
    found: Existing
    config: PackConfig
    num_jobs: int
    report: Report

    def continued(self, mode: str) -> PackPlan:
        """The plan of the same packing; of another, an error or the plan of a fresh one."""
        found = self.found
        # as the folder was cut, unless the user names another number
        size = self.config.samples_per_shard or found.settings.get(SHARD_SIZE)
        if type(size) is not int or size < 1:
            size = self._default_size(self.inputs)
        differences = Differences(settings=self._other_settings(size))
        # a manifest states the shards, and their records the inputs of each; without one the inputs
        # are cut anew and compared with the records that lie there
        if found.bound:
            settings = self.config.settings(size)
            tasks = _recorded_tasks(self.inputs, found, settings=settings, differences=differences)
        else:
            tasks = list_tasks(self.inputs, self.config, samples_per_shard=size)
            _compare_unbound(self.inputs, tasks, found=found, differences=differences)
        differences.gone += self._lost_sources(tasks)
        if differences:
            if mode == "refuse":
                raise refusal(found.directory, differences, what="holds another packing")
            tasks = list_tasks(
                self.asked,
                self.config,
                samples_per_shard=self.config.samples_per_shard or self._default_size(self.asked),
            )
            # raises where a tar is not ours, before anything is removed
            self._lost_sources(tasks)
            remove_packing(found)
            self.report(f"removed the {len(found.names)} shards that {found.directory} held")
            return PackPlan((), tuple(tasks))
        # shards of an append that was killed, beside a whole packing that is asked for once more
        names = {task.name for task in tasks}
        left = [name for name in found.unbound if name not in names]
        if left and mode == "replace":
            remove_shards(found.directory, left)
        elif left:
            self.report(
                f"{len(left)} finished shards of an --append that was stopped are not part of the "
                f"set, {left[0]} first: the same --append finishes it, --replace removes them"
            )
        return PackPlan((), tuple(tasks))

    def appended(self, is_array: bool) -> PackPlan:
        """The plan that keeps the shards of the folder and packs new inputs behind them."""
        found = self.found
        other = self._other_settings(found.settings.get(SHARD_SIZE, 1))
        if other:
            what = "was packed with other settings"
            raise refusal(found.directory, Differences(settings=other), what=what)
        # read again with all checks: these shards are bound once more without being packed
        kept = load_manifest(found.directory).shards if found.bound else ()
        new = self._not_packed(kept)
        size = self.config.samples_per_shard or self._default_size(new)
        # an append that was stopped is gone on with as it was cut
        if found.unbound and self.config.samples_per_shard is None:
            size = found.records[found.unbound[0]]["settings"][SHARD_SIZE]
        tasks = self._tasks_behind(kept, new, size=size)
        differences = Differences()
        _compare_unbound(new, tasks, found=found, differences=differences)
        # adopting depends on which shards are finished, which jobs of an array see differently
        if differences and is_array:
            what = "holds shards of another --append that was stopped"
            raise refusal(found.directory, differences, what=what)
        if differences:
            kept = (*kept, *self._adopted())
            new = self._not_packed(kept)
            tasks = self._tasks_behind(kept, new, size=size)
        lost = self._lost_sources(tasks)
        if lost:
            what = "holds a tar without its record"
            raise refusal(found.directory, Differences(gone=lost), what=what)
        if kept:
            self.report(
                f"{found.directory} holds {len(kept)} shards: {len(new)} new inputs go behind "
                f"them, {len(self.inputs) - len(new)} are packed already"
            )
        return PackPlan(kept, tuple(tasks))

    def _default_size(self, inputs: Sequence[Input]) -> int:
        return default_samples_per_shard(len(inputs), num_jobs=self.num_jobs)

    def _other_settings(self, samples_per_shard: int) -> list[str]:
        if not self.found.names:
            return []
        return setting_differences(self.found.settings, self.config.settings(samples_per_shard))

    def _lost_sources(self, tasks: list[Task]) -> list[str]:
        """Inputs that are not asked for and lie in tars without a record that the tasks will write
        over: a run was killed between the two. Raises DataPipelineError for a tar that the packer
        never wrote.
        """
        given = {item.source for item in self.inputs}
        lost = []
        for name in sorted({task.name for task in tasks}.intersection(self.found.loose)):
            path = self.found.directory / f"{name}.tar"
            sources = tar_sources(path)
            if sources is None:
                raise DataPipelineError(
                    f"{path} was not written by this command, or is damaged, and would be "
                    "overwritten: name another --output, or move that file away"
                )
            lost += [source for source in sources if source not in given]
        return lost

    def _tasks_behind(self, kept: Sequence[dict], new: list[Input], size: int) -> list[Task]:
        # behind the largest number in use; in an empty folder numbers begin at 0
        last = max((shard_number(record["name"]) for record in kept), default=-1)
        return list_tasks(new, self.config, samples_per_shard=size, first=last + 1)

    def _not_packed(self, kept: Sequence[dict]) -> list[Input]:
        """Inputs that made no sample yet: those that no shard names, and rejected ones whose file
        is another one by now.
        """
        # a later shard may hold what an earlier one rejected
        latest = {known.source: known for record in kept for known in known_inputs(record)}
        new = []
        differences = Differences()
        for item in self.inputs:
            known = latest.get(item.source)
            if known is None:
                new.append(item)
            elif not known.is_now(item):
                if known.rejected is None:
                    differences.changed.append(item.source)
                else:
                    new.append(item)
        if differences:
            what = "holds other samples of these names"
            raise refusal(self.found.directory, differences, what=what)
        return new

    def _adopted(self) -> list[dict]:
        """Records of shards that an append of other inputs finished before it was stopped."""
        directory = self.found.directory
        names = self.found.unbound
        for name in names:
            tar = directory / f"{name}.tar"
            size = self.found.records[name]["size"]
            if not tar.is_file() or tar.stat().st_size != size:
                raise DataPipelineError(
                    f"{tar} is not what its record says, and no manifest names it: remove "
                    f"{name}.json, and start again"
                )
        self.report(
            f"{len(names)} finished shards of an --append that was stopped are kept, "
            f"{names[0]} first"
        )
        # read again, as `found` has no members in its records
        records = [read_shard_record(directory / f"{name}.json") for name in names]
        return [record for record in records if record is not None]


def _under_packed_names(inputs: list[Input], found: Existing) -> list[Input]:
    """The inputs; one that the folder holds under another end of its path gets that name.

    How many folders a name contains depends on the other inputs (inputs.list_inputs): a.mp4 is
    A/a.mp4 as soon as B/a.mp4 comes. Taken for a new input, the file would be packed twice.
    """
    packed = {
        known.source: known for record in found.records.values() for known in known_inputs(record)
    }
    taken = {item.source for item in inputs}
    named = []
    for item in inputs:
        if item.source not in packed and not item.is_remote:
            parts = Path(os.path.abspath(item.location)).parts[1:]
            for start in reversed(range(len(parts))):
                source = "/".join(parts[start:])
                if source in packed and source not in taken and packed[source].is_now(item):
                    taken.add(source)
                    item = replace(item, source=source)
                    break
        named.append(item)
    return named


def _recorded_tasks(
    inputs: list[Input],
    found: Existing,
    settings: dict,
    differences: Differences,
) -> list[Task]:
    """A task for each shard of the manifest, with the inputs that its record names.

    A shard whose record is damaged takes the inputs that no other shard claims: the manifest knows
    how many they are.
    """
    waiting = {item.source: item for item in inputs}
    stated = Counter(
        known.source
        for entry in found.bound
        for known in known_inputs(found.records.get(entry["name"], {"inputs": (), "rejected": ()}))
    )
    claimed = {}
    for entry in found.bound:
        record = found.records.get(entry["name"])
        if record is not None:
            claimed[entry["name"]] = _claim(
                record,
                waiting=waiting,
                stated=stated,
                differences=differences,
            )
    # `waiting` has lost what was claimed; the order of the inputs decides who takes the rest
    rest = [item for item in inputs if item.source in waiting]
    tasks = []
    for entry in found.bound:
        name = entry["name"]
        if name in claimed:
            tasks.append(claimed[name])
            continue
        count = entry["num_samples"] + entry["num_rejected"]
        if len(rest) < count:
            differences.gone.append(f"one of {name}, whose record is damaged,")
        task = Task(
            name=name,
            inputs=tuple(rest[:count]),
            settings=settings,
            distrusts_record=name in found.damaged,
        )
        tasks.append(task)
        rest = rest[count:]
    differences.new += [item.source for item in rest]
    return tasks


def _claim(
    record: dict,
    waiting: dict[str, Input],
    stated: Counter[str],
    differences: Differences,
) -> Task:
    """Task of a recorded shard, whose inputs are taken out of `waiting`; what it lacks or what
    changed goes to `differences`.

    `stated` counts, for each source, the records from this one on that state it.
    """
    items: list[Input] = []
    superseded = {}
    pairs: list[tuple[KnownInput, Input]] = []
    for known in known_inputs(record):
        source = known.source
        stated[source] -= 1
        if source not in waiting:
            differences.gone.append(source)
        elif known.rejected is not None and stated[source]:
            # rejected here, and appended once the file was another one: that shard takes it
            superseded[source] = known.rejected
            items.append(waiting[source])
        else:
            item = waiting.pop(source)
            items.append(item)
            pairs.append((known, item))
    differences.compare(record, pairs)
    return Task(
        name=record["name"],
        inputs=tuple(items),
        settings=record["settings"],
        superseded=superseded,
    )


def _compare_unbound(
    inputs: list[Input],
    tasks: list[Task],
    found: Existing,
    differences: Differences,
) -> None:
    """Compare the records of a packing that was stopped with the tasks of the same numbers."""
    given = {item.source for item in inputs}
    by_name = {task.name: task for task in tasks}
    stated = {name: known_inputs(record) for name, record in found.records.items()}
    recorded = {known.source for shard in stated.values() for known in shard}
    for name in found.unbound:
        sources = [known.source for known in stated[name]]
        differences.gone += [source for source in sources if source not in given]
        task = by_name.get(name)
        asked = [] if task is None else [item.source for item in task.inputs]
        differences.new += [source for source in asked if source not in recorded]
        if task is None or asked != sources:
            differences.moved += [f"those of {name}"]
            continue
        record = found.records[name]
        differences.compare(record, list(zip(stated[name], task.inputs, strict=True)))
        # all shards of a packing have the same settings: one list of them is enough
        if not differences.settings:
            differences.settings = setting_differences(record["settings"], task.settings)
