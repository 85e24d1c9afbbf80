"""Reads a pickle as data. Nothing that it names is imported, called or executed.

The opcodes are decoded by the standard library's `pickletools`, which does not run them, and interpreted here
by a machine that knows only containers and constants. Where the pickle asks for a call, the machine writes
down which global would have been called on what (`Node`) and goes on; deciding what that means is left to the
reader of the result. Globals outside a list given by the caller are refused by name.

Memory besides the mapped file stays below its size (four times that for text) plus about 300 bytes for each
of at most `max_operations` opcodes; a declared length reserves nothing beyond what is left of the file.
"""

import math
import mmap
import pickletools
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
MAX_OPERATIONS = 1_000_000
MAX_BYTES = 2**34  # the largest released snapshot has a fifth of it
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"}
LITERALS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
# Tuples are refused as keys because hashing one that contains itself 2^n times never ends; large integers and
# floats because multiples of 2^61 - 1 all have the same hash.
KEY_TYPES = (str, int, bool, type(None))
MAX_KEY = 2**32


class RefusedPickle(ValueError):
    """The file is damaged, or contains something that its format does not."""


@dataclass(frozen=True, slots=True)
class Global:
    """A reference to something importable, by its dotted name."""

    name: str


@dataclass(eq=False, slots=True)
class Node:
    """The object that calling the global `function` on `args` would have made, and the state set on it.

    Items that the pickle adds to such an object are dropped.
    """

    function: str
    args: object
    state: object = None


def read_file(path: str | Path, allowed: Collection[str]) -> object:
    """Read the pickle in a file as `read_stream` does. Raises OSError, and RefusedPickle with its path."""
    with open(path, "rb") as file:
        size = Path(path).stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise RefusedPickle(f"{path}: has {size} bytes, expected 1 to {MAX_BYTES}")
        # A mapped file hands out at most what it has; file.read(n) would allocate n bytes first.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            try:
                return read_stream(stream, allowed)
            except RefusedPickle as error:
                raise RefusedPickle(f"{path}: {error}") from error


def read_stream(
    stream: BinaryIO | mmap.mmap, allowed: Collection[str], max_operations: int = MAX_OPERATIONS
) -> object:
    """Read one pickle and leave `stream` behind it.

    stream: its `read(n)` must not allocate more than is left; allowed: dotted names of the globals that may
    occur. What comes back are containers, constants, `Global` and `Node`; `collections.OrderedDict()` is a
    dict. Raises RefusedPickle for an unlisted global, an opcode that plain data does not need, and damage.
    """
    machine = _Machine(frozenset(allowed))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= max_operations:
                raise RefusedPickle(f"more than {max_operations} pickle operations")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except RefusedPickle:
        raise
    except MemoryError as error:
        raise RefusedPickle("needs more memory than there is") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        # What pickletools and the stack raise on damaged input; their texts can be as long as the input.
        raise RefusedPickle(f"damaged pickle ({type(error).__name__}: {str(error)[:200]})") from error
    raise RefusedPickle("damaged pickle (no STOP)")


class _Machine:
    """The stack machine; it knows no opcode but those of `step`."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.stack: list = []
        self.below: list[list] = []  # the stacks under each MARK
        self.memo: dict[int, object] = {}

    def step(self, opcode: str, argument: object) -> None:
        pop = self.stack.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case _ if opcode in LITERALS:
                self.push(argument)
            case _ if opcode in CONSTANTS:
                self.push(CONSTANTS[opcode])
            case _ if opcode in EMPTY:
                self.push(EMPTY[opcode]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode[-1]))]
                self.push(tuple(reversed(items)))
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                self.push(tuple(self.pop_mark()))
            case "APPEND":
                self.extend([pop()])
            case "APPENDS":
                self.extend(self.pop_mark())
            case "SETITEM":
                value, key = pop(), pop()
                self.update([key, value])
            case "SETITEMS":
                self.update(self.pop_mark())
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.push(self.memo[argument])
            case "GLOBAL":
                self.push_global(argument.replace(" ", "."))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                if type(name) is not str or type(module) is not str:
                    raise RefusedPickle("a global whose name is not text")
                self.push_global(f"{module}.{name}")
            case "BINPERSID":
                self.push(Node("persistent id", pop()))
            case "REDUCE" | "NEWOBJ":
                args, function = pop(), pop()
                if type(function) is not Global or type(args) is not tuple:
                    raise RefusedPickle("a call of something that is not a global")
                empty = function.name == "collections.OrderedDict" and not args
                self.push({} if empty else Node(function.name, args))
            case "BUILD":
                state = pop()
                if type(self.stack[-1]) is Node:
                    self.stack[-1].state = state
                elif type(self.stack[-1]) is not dict:  # attributes of an OrderedDict are dropped
                    raise RefusedPickle(f"state set on a {type(self.stack[-1]).__name__}")
            case _:
                raise RefusedPickle(f"refused pickle opcode {opcode}")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_global(self, name: str) -> None:
        if name not in self.allowed:
            raise RefusedPickle(f"refused global {name[:200]!r}")
        self.push(Global(name))

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Node:
            raise RefusedPickle(f"items appended to a {type(target).__name__}")

    def update(self, items: list) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) is Node:
            return
        if type(target) is not dict or len(items) % 2:
            raise RefusedPickle(f"{len(items)} keys and values set on a {type(target).__name__}")
        for key in keys:
            if type(key) not in KEY_TYPES or (type(key) is int and abs(key) > MAX_KEY):
                raise RefusedPickle(f"refused a {type(key).__name__} as key of a dict")
        target.update(zip(keys, items[1::2], strict=True))


def arguments(node: object, function: str, where: str, *counts: int) -> tuple:
    """Return the arguments of `node`, which has to be a call of `function` with one of `counts` of them.

    where: what is read, for messages. Raises RefusedPickle.
    """
    if type(node) is not Node or node.function != function or type(node.args) is not tuple:
        raise RefusedPickle(f"{where}: not a call of {function}")
    if len(node.args) not in counts:
        raise RefusedPickle(f"{where}: {len(node.args)} arguments of {function}")
    return node.args


def check_layout(offset: object, size: object, stride: object, numel: int, where: str) -> None:
    """Raise RefusedPickle unless a tensor is contiguous and covers its storage of `numel` elements exactly.

    With other strides, such as 0, a tensor of any declared size could have a storage of one element.
    """
    if type(size) is not tuple or not 1 <= len(size) <= 4 or any(type(n) is not int or n < 1 for n in size):
        raise RefusedPickle(f"{where}: not the size of a parameter")
    contiguous = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if offset != 0 or stride != contiguous or contiguous[0] * size[0] != numel:
        raise RefusedPickle(f"{where}: size, stride and offset do not cover the storage exactly")
