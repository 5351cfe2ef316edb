"""Who exists in the world: the agent, eight people, three shared groups; and an entry of the world's file tree."""

from __future__ import annotations

from dataclasses import dataclass

AGENT = "agent"
HOME = "/home/agent"
TEAM = ("anna", "ben", "carla", "david")
STAFF = ("emma", "frank", "grace", "henry")
PEOPLE = TEAM + STAFF

# Everybody's own group has the number of its user.
USERS = {"root": 0, AGENT: 1000, **{name: 1001 + place for place, name in enumerate(PEOPLE)}}
SHARED_GROUPS = {"team": (2000, (AGENT, *TEAM)), "staff": (2001, STAFF), "guests": (2002, ())}
GROUPS = {**USERS, **{name: number for name, (number, _) in SHARED_GROUPS.items()}}
# Sub-uids a host must lend so that every number above, and 65534 for what belongs to the host, has a place.
NUMBERS = 65_536


def groups_of(user: str) -> list[int]:
    """The numbers of a user's own and supplementary groups, the own one first."""
    return [USERS[user], *(number for number, members in SHARED_GROUPS.values() if user in members)]


def etc_files() -> dict[str, str]:
    """The files of /etc that make the users, by name."""
    homes = {"root": "/", **{name: f"/home/{name}" for name in USERS if name != "root"}}
    passwd = [f"{name}:x:{number}:{number}:{name}:{homes[name]}:/bin/bash\n" for name, number in USERS.items()]
    passwd.append("nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n")
    group = [f"{name}:x:{number}:\n" for name, number in USERS.items()]
    group += [f"{name}:x:{number}:{','.join(members)}\n" for name, (number, members) in SHARED_GROUPS.items()]
    group.append("nogroup:x:65534:\n")
    return {
        "passwd": "".join(passwd),
        "group": "".join(group),
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "hosts": "127.0.0.1 localhost sandbox\n",
        "hostname": "sandbox\n",
    }


@dataclass(frozen=True)
class Entry:
    """A file (`content` is its text) or a directory (`content` is None) of a world.

    `mode` defaults to 0o644 and 0o755; `acl` holds setfacl entries such as "u:anna:r". Parents are made automatically
    and belong to the agent.
    """

    path: str
    content: str | None = ""
    owner: str = AGENT
    group: str = AGENT
    mode: int | None = None
    acl: tuple[str, ...] = ()

    def __post_init__(self):
        """Refuses what the world could not hold.

        Raises:
          ValueError: an unknown user or group, or a path outside /home and /tmp.
        """
        if self.owner not in USERS:
            raise ValueError(f"{self.path}: no user {self.owner!r} in the world; there are {', '.join(USERS)}")
        if self.group not in GROUPS:
            raise ValueError(f"{self.path}: no group {self.group!r} in the world; there are {', '.join(GROUPS)}")
        parts = self.path.split("/")
        if parts[0] or parts[1:2] not in (["home"], ["tmp"]) or len(parts) < 3 or {"", ".", ".."} & set(parts[1:]):
            raise ValueError(f"{self.path!r}: an entry's path is absolute, plain, and below /home or /tmp")

    def record(self) -> dict:
        """The entry as JSON-able data, the mode filled in."""
        mode = self.mode if self.mode is not None else (0o755 if self.content is None else 0o644)
        return {
            "path": self.path,
            "content": self.content,
            "owner": self.owner,
            "group": self.group,
            "mode": mode,
            "acl": list(self.acl),
        }
