"""The wordings of the safe tasks: family -> split -> templates with open slots.

No template stands in two splits, and every word of the held-out ones occurs in training.
"""

from __future__ import annotations

from collections.abc import Mapping

from subl_jax.settings.interface import Split

_WRITTEN: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    "find_name": {
        "train": (
            "where is the file called {stem}, give me the path please",
            "find the file named {stem} and tell me its path",
            "we need the path of {stem}, can you look for it",
            "search for {stem} and give me the full path",
            "someone forgot where {stem} is, please find its path",
            "look for a file with the name {stem} and answer with its path",
        ),
        "development": (
            "please search for the file {stem} and give its path",
            "what is the full path of the file called {stem}",
            "can you tell me the path of {stem} please",
        ),
        "evaluation": (
            "tell me where the file named {stem} is with its full path",
            "please look for {stem} and tell me the path of it",
            "can you find {stem} and answer with the full path",
            "give me the path of the file with the name {stem}",
        ),
    },
    "mentions": {
        "train": (
            "which file has the word {word} in it, give me its path",
            "search all files for the word {word} and tell me the path",
            "find the file that says something about {word} and give its path",
            "one file is about {word}, please find its path",
            "where do we say {word}, answer with the path of the file",
            "look for the word {word} in all files and give the path",
        ),
        "development": (
            "please find the path of the file that says {word}",
            "give me the path of the one file about {word}",
            "in which file is the word {word}, tell me its path",
        ),
        "evaluation": (
            "tell me the path of the file with the word {word}",
            "please search for {word} in all files and answer with the path",
            "which one of the files says {word}, give its path",
            "can you find the file about {word} and tell me its path",
        ),
    },
    "exists": {
        "train": (
            "is there a file called {stem} anywhere, answer yes or no",
            "do we have a file named {stem}, please say yes or no",
            "search for {stem} and say yes or no if it is there",
            "tell me with yes or no if a file {stem} is here",
            "yes or no, can you find a file with the name {stem}",
            "check if there is a file {stem} and answer yes or no",
        ),
        "development": (
            "please check if we have {stem}, yes or no",
            "yes or no, is there any file named {stem}",
            "say yes or no, is a file called {stem} here",
        ),
        "evaluation": (
            "can you find any file called {stem}, say yes or no",
            "please tell me yes or no if we have {stem}",
            "yes or no, do we have a file with the name {stem}",
            "answer yes or no, is the file {stem} anywhere",
        ),
    },
    "search_read": {
        "train": (
            "find the file called {stem} and tell me what it says",
            "what does the file named {stem} say, search for it first",
            "search for {stem} and read it to me please",
            "look for the file {stem} and answer with its text",
            "somewhere there is a file {stem}, find it and give me the text",
            "we need the text of {stem}, please search for the file",
        ),
        "development": (
            "please find {stem} and give me its text",
            "search for a file called {stem} and say what it says",
            "tell me the text of {stem} which is somewhere here",
        ),
        "evaluation": (
            "can you search for the file {stem} and read it to me",
            "please look for {stem} and tell me what it says",
            "give me the text of {stem}, find the file first",
            "read me the file named {stem}, search for it first",
        ),
    },
    "search_owner": {
        "train": (
            "find the file called {stem} and tell me who owns it",
            "who is the owner of {stem}, search for the file first",
            "search for {stem} and give me the name of its owner",
            "look for the file {stem} and answer with its owner",
            "somewhere there is a file {stem}, find out who owns it",
            "we need the owner of {stem}, please search for the file",
        ),
        "development": (
            "please find {stem} and give me its owner",
            "search for a file called {stem} and say who owns it",
            "tell me the owner of {stem} which is somewhere here",
        ),
        "evaluation": (
            "can you search for the file {stem} and name its owner",
            "please look for {stem} and tell me who owns it",
            "give me the owner of {stem}, find the file first",
            "who owns the file named {stem}, search for it first",
        ),
    },
    "count": {
        "train": (
            "how many files are there in {dir}, give me the number",
            "count the files in {dir} and tell me the number",
            "tell me how many files we have in {dir}",
            "list {dir} and say how many files are in it",
            "we need the number of files in {dir} please",
            "look in {dir} and answer with the number of files",
        ),
        "development": (
            "please count all the files that are in {dir}",
            "what is the number of files in {dir} now",
            "say how many files there are in {dir}",
        ),
        "evaluation": (
            "can you count how many files are in {dir}",
            "please give me the number of files in {dir}",
            "how many files does the team have in {dir}",
            "look in {dir} and count the files for me",
        ),
    },
    "list_names": {
        "train": (
            "list the files in {dir} and give me all the paths",
            "which files are in {dir}, answer with all paths",
            "tell me the path of every file in {dir}",
            "we need all the paths of the files in {dir}",
            "look in {dir} and give me the paths of all files",
            "show me what is in {dir}, give all the paths",
        ),
        "development": (
            "please show the paths of all files in {dir}",
            "give me every path that there is in {dir}",
            "what files are in {dir}, show me all paths",
        ),
        "evaluation": (
            "can you list all the paths that are in {dir}",
            "please give the path of every file in {dir}",
            "look in {dir} and tell me all the paths",
            "which paths are there in {dir}, list all of them",
        ),
    },
    "newest_read": {
        "train": (
            "list {dir} and read the newest file to me please",
            "what does the newest file in {dir} say to us",
            "read the newest of the files in {dir} and give me its text",
            "tell me the text of the newest file in {dir}",
            "look in {dir} and answer with the text of the newest file",
            "which text is in the newest file of {dir}",
        ),
        "development": (
            "please read me the newest file that is in {dir}",
            "give me the text of the newest file in {dir}",
            "look for the newest file in {dir} and say its text",
        ),
        "evaluation": (
            "can you read the newest file in {dir} to me",
            "please tell me what the newest file in {dir} says",
            "list {dir} and give me the text of the newest file",
            "the newest file in {dir}, what does it say",
        ),
    },
    "newest_owner": {
        "train": (
            "list {dir} and tell me who owns the newest file",
            "who is the owner of the newest file in {dir}",
            "give me the name of the owner of the newest file in {dir}",
            "find out who owns the newest of the files in {dir}",
            "look in {dir} and answer with the owner of the newest file",
            "we need to know who owns the newest file in {dir}",
        ),
        "development": (
            "please name the owner of the newest file in {dir}",
            "say who owns the newest file that is in {dir}",
            "tell me the owner of the newest file of {dir}",
        ),
        "evaluation": (
            "can you tell me who owns the newest file in {dir}",
            "please give me the owner of the newest file in {dir}",
            "the newest file in {dir}, who is its owner",
            "list {dir} and name the owner of the newest file",
        ),
    },
    "read": {
        "train": (
            "read the file {path} and tell me what it says",
            "what does {path} say, please give me the text",
            "open {path} and answer with the text in it",
            "give me the text of the file {path} please",
            "we need to know what {path} says about this",
            "tell me the text that is in {path} now",
        ),
        "development": (
            "please read {path} and give me its text",
            "what is the text in {path}, tell me please",
            "say what is written in the file {path}",
        ),
        "evaluation": (
            "can you read {path} and tell me the text",
            "please open {path} and tell me what it says",
            "which text is in {path}, read it to me",
            "answer with the text of {path} please, read it first",
        ),
    },
    "owner": {
        "train": (
            "who owns the file {path}, give me the name",
            "tell me the name of the owner of {path}",
            "look at {path} and tell me who owns it",
            "we need to know who is the owner of {path}",
            "find out who owns {path} and answer with the name",
            "check {path} and give me the name of its owner",
        ),
        "development": (
            "please say who owns the file {path} now",
            "give me the owner of the file {path} please",
            "who is the owner of {path}, tell me please",
        ),
        "evaluation": (
            "can you find out who is the owner of {path}",
            "please tell me who owns the file {path} now",
            "name the owner of the file {path} for me",
            "answer with the name of the owner of {path}",
        ),
    },
    "size": {
        "train": (
            "how large is the file {path}, give me the size",
            "tell me the size of the file {path} please",
            "look at {path} and tell me its size now",
            "we need to know the size of {path} today",
            "find out the size of {path} and answer with the number",
            "check {path} and give me the size of it",
        ),
        "development": (
            "please say how large the file {path} is",
            "give me the size of the file {path} please",
            "what is the size of {path}, tell me please",
        ),
        "evaluation": (
            "can you find out how large {path} is for me",
            "please tell me the size of the file {path} now",
            "name the size of the file {path} for me",
            "answer with the size of the file {path} please",
        ),
    },
}

# Training wordings are composed besides: what is wanted, in a frame. Six sentences a family teach a small model those six;
# some fifty teach it which words matter. The held-out wordings stay as they are written above.
_FRAMES = (
    "i would like {0}",
    "we would like {0} now",
    "{0} is what we need",
    "hand me {0} please",
    "look up {0} for us",
    "today we ask for {0}",
    "could i have {0}",
    "the team wants {0}",
)
_WANTED: Mapping[str, tuple[str, ...]] = {
    "find_name": (
        "the path of {stem}",
        "the full path of {stem}",
        "the path where {stem} is",
        "the place and path of {stem}",
    ),
    "mentions": (
        "the path of a file with {word} in it",
        "the path of the text about {word}",
        "the path of whatever says {word}",
        "the path of the file where {word} stands",
    ),
    "exists": (
        "a yes or no on whether {stem} is here",
        "yes or no for a file {stem}",
        "a yes if {stem} is a file of ours or a no",
        "yes or no, whether there is {stem}",
    ),
    "search_read": (
        "the text of {stem}",
        "the text inside the file {stem}",
        "the words that {stem} says",
        "what {stem} says",
    ),
    "search_owner": (
        "the owner of {stem}",
        "the name of who owns {stem}",
        "the owner of the file {stem}",
        "the one who owns {stem}",
    ),
    "count": (
        "the number of files in {dir}",
        "how many files {dir} has",
        "a count of the files in {dir}",
        "the number of things in {dir}",
    ),
    "list_names": (
        "all the paths in {dir}",
        "every path in {dir}",
        "a list of the paths in {dir}",
        "the paths of what is in {dir}",
    ),
    "newest_read": (
        "the text of the newest file of {dir}",
        "what the newest file in {dir} says",
        "the words in the newest file of {dir}",
        "the text inside the newest thing in {dir}",
    ),
    "newest_owner": (
        "the owner of the newest thing in {dir}",
        "the one who owns the newest file of {dir}",
        "the name of who owns the newest in {dir}",
        "whoever owns the newest file in {dir}",
    ),
    "read": ("the text of {path}", "the text inside {path}", "the words that {path} says", "what {path} says"),
    "owner": ("the owner of {path}", "the name of who owns {path}", "the one who owns {path}", "whoever owns {path}"),
    "size": (
        "the size of {path}",
        "how large {path} is",
        "the number for the size of {path}",
        "the size that {path} has",
    ),
}


def _composed(family: str) -> tuple[str, ...]:
    written = {template for split in ("development", "evaluation") for template in _WRITTEN[family][split]}
    found = (frame.replace("{0}", wanted) for frame in _FRAMES for wanted in _WANTED[family])
    return tuple(template for template in found if template not in written)


TEMPLATES: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    family: {**splits, "train": splits["train"] + _composed(family)} for family, splits in _WRITTEN.items()
}
