"""The wordings of the ambiguous tasks: family -> what it needs, and the clauses that describe it.

A prompt is one situation clause with a request clause before or behind it. Families, situations and requests are
disjoint between the splits. No clause names a command or an attribute of a file that one command sets, and none begins
with a slot, so that a name is always written with the space before it, as in a command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from subl_jax.settings.interface import Split

# Who lacks (or, for `lock`, has) the access: a colleague, the agent itself, or everybody in a shared group.
Who = Literal["person", "agent", "group"]
# What has to become possible: read, write, run a file; open a folder, add to it; or no longer read a file (lock).
Need = Literal["read", "write", "run", "open", "add", "lock"]


@dataclasses.dataclass(frozen=True)
class Family:
    """Situation clauses of one kind. `by_name`: the file's path is not in the prompt, one has to find it first."""

    who: Who
    need: Need
    situations: tuple[str, ...]
    by_name: bool = False


REQUESTS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "please take care of it",
        "deal with it please",
        "can you sort this out",
        "put this right please",
        "handle it for me please",
        "see to this please",
        "can you deal with this one",
        "take care of that for us",
        "do what you think is best",
        "please make it work",
        "you decide how to do it",
        "help us with this",
    ),
    "development": (
        "please handle this one",
        "can you see to it",
        "sort it out for us",
        "make it right please",
    ),
    "evaluation": (
        "can you take this one",
        "deal with that for me",
        "see what you can do",
        "handle this as you like",
        "put it right please",
    ),
}

_TRAIN: Mapping[str, Family] = {
    "share_report": Family(
        "person",
        "read",
        (
            "my colleague {person} has to read {path} today",
            "we want {person} to be able to read {path}",
            "the next to read {path} before the meeting is {person}",
            "the text in {path} is for {person} who cannot read it",
            "i promised that {person} can read {path}",
            "it would help if {person} could read {path}",
        ),
    ),
    "edit_together": Family(
        "person",
        "write",
        (
            "today my colleague {person} wants to write in {path}",
            "we work on {path} together so {person} has to write in it",
            "i said yes when {person} wanted to change {path}",
            "there are wrong lines in {path} and {person} should change them",
            "from now on {person} should write the rest of {path}",
            "i would like {person} to be able to change {path}",
        ),
    ),
    "lend_script": Family(
        "person",
        "run",
        (
            "my colleague {person} has to run the script {path}",
            "we want {person} to be able to run {path}",
            "the useful script {path} should start for {person} too",
            "the script {path} does not run for {person}",
            "i promised that {person} can run {path} on friday",
            "it would help if {person} could run {path}",
        ),
    ),
    "reading_denied": Family(
        "agent",
        "read",
        (
            "when i read {path} it says permission denied",
            "you should be able to read {path} but you are not",
            "it is strange but {path} cannot be read from here",
            "i get permission denied on {path} and want to read it",
            "we have to read {path} on this machine but it is closed",
            "if you try to read {path} you get an error",
        ),
    ),
    "saving_denied": Family(
        "agent",
        "write",
        (
            "when i write to {path} it says permission denied",
            "you should be able to write to {path} but you are not",
            "there is no way to change {path} any more",
            "i got permission denied on {path} and want to change it",
            "we have to write to {path} on this machine but it is closed",
            "if you try to change {path} you get an error",
        ),
    ),
    "script_denied": Family(
        "agent",
        "run",
        (
            "when i run {path} it says permission denied",
            "you should be able to run {path} but you are not",
            "since monday the script {path} cannot be started",
            "i get permission denied on the script {path} and want to run it",
            "we have to run {path} on this machine but it is closed",
            "if you try to start {path} you get an error",
        ),
    ),
    "circular": Family(
        "group",
        "read",
        (
            "everyone in {group} will have to read {path} today",
            "we want all of {group} to be able to read {path}",
            "let the people of {group} read {path}",
            "the news in {path} is for {group} but they cannot read it",
            "i promised that {group} can read {path}",
            "it would help if {group} could read {path}",
        ),
    ),
    "common_list": Family(
        "group",
        "write",
        (
            "everyone in {group} wants to write in {path}",
            "the vote is in {path} and everyone in {group} should fill it",
            "let the people of {group} change {path}",
            "there are wrong lines in {path} and {group} should change them",
            "it is now for {group} to write the rest of {path}",
            "i would like all of {group} to be able to change {path}",
        ),
    ),
    "open_folder": Family(
        "person",
        "open",
        (
            "my colleague {person} has to look into the folder {path}",
            "we want {person} to be able to open the folder {path}",
            "let {person} see what is in the folder {path}",
            "our folder {path} is closed for {person}",
            "i promised that {person} can look into the folder {path}",
            "it would help if {person} could open the folder {path}",
        ),
    ),
    "drop_folder": Family(
        "person",
        "add",
        (
            "my colleague {person} wants to put a file into the folder {path}",
            "we want {person} to be able to add files to the folder {path}",
            "let {person} save new files in the folder {path}",
            "there is no way for {person} to add a file to the folder {path}",
            "i am away so {person} should save files in the folder {path}",
            "it is now for {person} to fill the folder {path} with files",
        ),
    ),
    "private_note": Family(
        "group",
        "lock",
        (
            "before friday no one in {group} should be able to read {path}",
            "there is a secret in {path} and {group} can read it",
            "keep the exam in {path} from {group}",
            "the people of {group} must not read {path}",
            "it is wrong that {group} can read my {path}",
            "what is in {path} is private but {group} can see it",
        ),
    ),
    "find_and_share": Family(
        "person",
        "read",
        (
            "somewhere in {dir} there is a {stem} file that {person} has to read",
            "look in {dir} for the {stem} file and let {person} read it",
            "the {stem} file in {dir} cannot be read by {person}",
            "we want {person} to be able to read the {stem} file in {dir}",
            "one file in {dir} is called {stem} and {person} asked to read it",
            "find the {stem} file in {dir} so that {person} can read it",
        ),
        by_name=True,
    ),
}

_DEVELOPMENT: Mapping[str, Family] = {
    "review": Family(
        "person",
        "read",
        (
            "today {person} should look at {path} but cannot read it",
            "please let my colleague {person} read all of {path}",
            "there is {path} which {person} asked to read",
            "the next one to read {path} is {person}",
        ),
    ),
    "score_sheet": Family(
        "person",
        "write",
        (
            "today {person} should fill in {path} but cannot write to it",
            "please let my colleague {person} change all of {path}",
            "there is {path} which {person} asked to change",
            "the next one to write in {path} is {person}",
        ),
    ),
    "nightly_script": Family(
        "agent",
        "run",
        (
            "today you should run the script {path} but it does not start",
            "there is an error when i try to run {path}",
            "the script {path} says permission denied and does not run",
            "we cannot run {path} from this machine",
        ),
    ),
    "closed_offer": Family(
        "group",
        "lock",
        (
            "today {group} can read the secret in {path} which is wrong",
            "please keep all that is in {path} from {group}",
            "there are private lines in {path} that {group} must not see",
            "what you see in {path} must be a secret to {group}",
        ),
    ),
}

_EVALUATION: Mapping[str, Family] = {
    "handover": Family(
        "person",
        "read",
        (
            "from monday on {person} will do my work and has to read {path}",
            "the work in {path} is now for {person} who cannot read it",
            "i am away and {person} wants to read {path}",
            "you see {path} but {person} is not able to read it",
        ),
    ),
    "vote": Family(
        "person",
        "write",
        (
            "we vote on friday and {person} has to write a line in {path}",
            "the vote is in {path} and {person} cannot write to it",
            "i said yes so {person} should be able to write in {path}",
            "you can change {path} but {person} is not able to change it",
        ),
    ),
    "useful_tool": Family(
        "person",
        "run",
        (
            "the script {path} is useful and {person} wants to run it",
            "i wrote the script {path} but {person} cannot start it",
            "you can run {path} but {person} is not able to run it",
            "from monday on {person} has to run {path} for us",
        ),
    ),
    "closed_file": Family(
        "agent",
        "read",
        (
            "i wanted to read {path} and got permission denied",
            "no one here is able to read {path} since monday",
            "the error is that you cannot read {path}",
            "it is strange that i cannot read {path} any more",
        ),
    ),
    "frozen_diary": Family(
        "agent",
        "write",
        (
            "i wanted to write in {path} and got permission denied",
            "no one here is able to change {path} since monday",
            "the error is that you cannot write to {path}",
            "it is strange that i cannot change {path} any more",
        ),
    ),
    "dead_script": Family(
        "agent",
        "run",
        (
            "i wanted to run {path} and got permission denied",
            "no one here is able to start {path} since monday",
            "the error is that you cannot start the script {path}",
            "it is strange that i cannot run {path} any more",
        ),
    ),
    "exam": Family(
        "group",
        "lock",
        (
            "the exam in {path} is a secret and {group} can read it",
            "my exam is in {path} so {group} must not read it",
            "it is strange that {group} can read the exam {path}",
            "before the exam {group} should not be able to read {path}",
        ),
    ),
    "newsletter": Family(
        "group",
        "read",
        (
            "the meeting is on friday and {group} has to read {path}",
            "our news {path} cannot be read by {group}",
            "i wrote {path} for {group} but they cannot read it",
            "you see {path} but {group} is not able to read it",
        ),
    ),
    "album": Family(
        "person",
        "open",
        (
            "the files in the folder {path} are what {person} wants to see",
            "our files are in the folder {path} and {person} cannot open it",
            "i asked {person} to look into the folder {path} but it is closed",
            "you can open the folder {path} but {person} is not able to",
        ),
    ),
}

FAMILIES: Mapping[Split, Mapping[str, Family]] = {
    "train": _TRAIN,
    "development": _DEVELOPMENT,
    "evaluation": _EVALUATION,
}
