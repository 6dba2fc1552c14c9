"""The FUSE ABI as far as this front end speaks it: opcodes, flags and the layout of the structures, nothing else.

Facts are those of the kernel's `linux/fuse.h`, version 7.40 (HAS_RESEND). All fields are in the machine's byte order and
laid out without implicit padding, hence `=` in every format. Names follow the header's, without the `fuse_` prefix.
"""

from __future__ import annotations

from struct import Struct

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 40
OLDEST_MINOR_VERSION = 23
"""From 7.23 on, init_out has its 64 bytes."""

ROOT_ID = 1
MIN_READ_BUFFER = 8192
PAGE = 4096
PAGES_A_REQUEST = 256
MAX_READ = PAGES_A_REQUEST * PAGE + PAGE
"""Bytes of the mount option max_read, which is a page more than what `max_pages` of INIT lets the kernel ask for."""

# Opcodes.
LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
READLINK = 5
SYMLINK = 6
MKNOD = 8
MKDIR = 9
UNLINK = 10
RMDIR = 11
RENAME = 12
LINK = 13
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
SETXATTR = 21
GETXATTR = 22
LISTXATTR = 23
REMOVEXATTR = 24
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
FSYNCDIR = 30
ACCESS = 34
CREATE = 35
INTERRUPT = 36
DESTROY = 38
IOCTL = 39
BATCH_FORGET = 42
FALLOCATE = 43
READDIRPLUS = 44
RENAME2 = 45
COPY_FILE_RANGE = 47
TMPFILE = 51
OPCODES = 64
"""Size of a table that is indexed by opcode; anything above is unknown."""

# Flags of FUSE_INIT. Bits 32 and up travel in flags2 and need INIT_EXT.
ASYNC_READ = 1 << 0
DO_READDIRPLUS = 1 << 13
NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
ABORT_ERROR = 1 << 21
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
EXPLICIT_INVAL_DATA = 1 << 25
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39

# open_out.open_flags
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3

NOTIFY_INVAL_INODE = 2
NOTIFY_RESEND = 7
UNIQUE_RESEND = 1 << 63
"""Set in `unique` of a request that the kernel sends again; the reply must carry it as well."""

DEV_IOC_CLONE = 0x8004E500
"""_IOR(229, 0, u32): makes a fresh /dev/fuse fd a second reader of the session whose fd is the argument."""

IN_HEADER = Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
REQUEST = Struct("=IIQQ8xI4x")
"""IN_HEADER without what the dispatcher ignores: len, opcode, unique, nodeid, pid."""
OUT_HEADER = Struct("=IiQ")
"""len, error (0 or a negative errno; in a notification its code), unique (0 in a notification)."""

INIT_IN = Struct("=IIII")
"""major, minor, max_readahead, flags: what all versions send."""
INIT_IN_EXT = Struct("=I")
"""flags2, right after INIT_IN, when flags has INIT_EXT."""
INIT_OUT = Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout."""

ATTR = Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags."""
ENTRY_OUT = Struct("=QQQQII" + ATTR.format[1:])
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, then ATTR."""
ATTR_OUT = Struct("=QII" + ATTR.format[1:])
"""attr_valid, attr_valid_nsec, dummy, then ATTR."""

OPEN_OUT = Struct("=QII")
"""fh, open_flags, backing_id."""
READ_IN = Struct("=QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding. Also of READDIR and READDIRPLUS."""
READ_FIELDS = Struct("=8xQI12xI4x")
"""READ_IN without what is ignored: offset, size, flags (of the open file)."""
READ_REQUEST = Struct("=4xIQQ8xI4x8xQI20x")
"""A READ in one piece: opcode, unique, node id, pid, offset, size. Of other requests the last two mean nothing."""
GETXATTR_IN = Struct("=II")
"""size, padding; the name follows, ended by NUL, for GETXATTR."""
GETXATTR_OUT = Struct("=II")
"""size, padding: the answer to a request of size 0."""
ACCESS_IN = Struct("=II")
"""mask, padding."""
INTERRUPT_IN = Struct("=Q")
"""unique of the request to interrupt."""
NOTIFY_INVAL_INODE_OUT = Struct("=Qqq")
"""ino, off, len; off < 0: attributes only."""
STATFS_OUT = Struct("=QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare."""
DIRENT = Struct("=QQII")
"""ino, off, namelen, type; the name follows, padded with zeros to 8 bytes."""
DIRENTPLUS = Struct(ENTRY_OUT.format + DIRENT.format[1:])
"""ENTRY_OUT then DIRENT."""
