"""The options of every request, each declared once.

They are keyword arguments: ``def dump(..., **options: Unpack[DumpOptions])``.
Names are those of CRIU's ``criu_opts`` (images/rpc.proto), except for
``page_server``, ``ps_socket`` and ``work_dir``. A ``Field`` beside each type
says how the option travels and which CRIU is the first to read it;
``_option_encoding.py`` reads that back. An option that is not given, or given
as None, is not sent, and CRIU's default holds: the one of its own
configuration file, if it reads one.

The groups below are by the requests that heed an option, as CRIU's source has
it; its manual and its RPC take more without using it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, TypedDict

from criupy.rpc import _fields as f
from criupy.rpc import _option_checks as check
from criupy.rpc import _option_types as types
from criupy.rpc._fields import Field, many, one
from criupy.rpc._option_types import (
    CgroupsMode,
    CpuCapability,
    Directory,
    EmptyNamespace,
    HasFileno,
    ImageIoMode,
    JoinNs,
    NetworkLock,
    PreDumpMode,
    StrPath,
)

__all__ = [
    "CheckOptions",
    "CommonOptions",
    "CpuOptions",
    "CpuinfoOptions",
    "DumpOptions",
    "EndStateOptions",
    "FullDumpOptions",
    "ImageOptions",
    "LazyDumpOptions",
    "LazyRestoreOptions",
    "PageServerAddressOptions",
    "PageServerOptions",
    "PreDumpOptions",
    "RestoreOptions",
    "StatisticsOptions",
    "StatusFdOptions",
    "StopOptions",
    "TaskOptions",
    "TlsOptions",
    "TransferOptions",
]


class CommonOptions(TypedDict, total=False):
    """Options of every request."""

    work_dir: Annotated[Directory, Field(f.work_dir, wire="work_dir_fd")]
    """Where CRIU writes its log and statistics and looks for the lazy-pages socket; other relative paths
    start here as well. CRIU's default is the images directory."""

    log_file: Annotated[str, Field(one(check.log_file))]
    """Name of the log in ``work_dir``, without directories; ``criu.log`` by default. An older log of that
    name is overwritten."""

    log_level: Annotated[int, Field(one(check.integer(0, 4)))]
    """How much is logged: 0 only messages to people, 1 errors, 2 warnings, 3 progress, 4 everything.
    Over RPC the default is 2, even where CRIU's configuration file says otherwise."""

    log_to_stderr: Annotated[bool, Field(one(check.flag), since=(3, 19))]
    """Log to CRIU's standard error and to no file. Since 3.19."""

    unprivileged: Annotated[bool, Field(one(check.flag), since=(3, 18))]
    """Work without root, with CAP_CHECKPOINT_RESTORE, and leave out what that does not allow (cgroups,
    among others). ``check`` heeds it only while it logs to a file. Since 3.18."""

    config_file: Annotated[StrPath, Field(one(check.host_file), since=(3, 11))]
    """A file of CRIU's command line options, one a line without the dashes. CRIU reads it last, so it wins
    over all options given here. Since 3.11."""

    extra: Annotated[
        Mapping[int, bool | int | str | bytes | Sequence[bool | int | str | bytes]], Field(f.extra, wire="")
    ]
    """Fields of ``criu_opts`` that criupy does not know, by number: bool and int are sent as a varint, str
    and bytes with their length, a sequence as a repeated field. An older CRIU ignores them."""


class ImageOptions(TypedDict, total=False):
    """Dump, lazy dump, pre-dump, restore and page server."""

    auto_dedup: Annotated[bool, Field(one(check.flag))]
    """On a dump or in a page server, punch pages that are written anew out of the parent's images; on a
    restore, punch each page out of the images as soon as it is restored. Off by default. A dump to a page
    server leaves this to the server's own option."""

    image_io_mode: Annotated[ImageIoMode, Field(one(check.choice(types.IMAGE_IO_MODE)), since=(4, 3))]
    """Read and write page images through the page cache ("writeback", CRIU's default) or past it
    ("direct"), which helps when they are not cached and hurts when they are. The images are the same.
    Needs a CRIU after 4.2."""


class StatisticsOptions(TypedDict, total=False):
    """Dump, lazy dump, pre-dump and restore."""

    display_stats: Annotated[bool, Field(one(check.flag), since=(3, 19))]
    """Print the statistics, which are written to ``work_dir`` in any case, to CRIU's standard output as
    well. Off by default. Since 3.19."""


class TlsOptions(TypedDict, total=False):
    """Dump, lazy dump, pre-dump, page server, and the lazy-pages daemon of a lazy restore."""

    tls: Annotated[bool, Field(one(check.flag), since=(3, 13))]
    """Encrypt the page transfer and authenticate both of its ends with X.509 certificates. Off by default.
    Since 3.13."""

    tls_cacert: Annotated[StrPath, Field(one(check.host_file), since=(3, 13))]
    """Certificates of the authorities to trust, as PEM, and none besides. By default the system's, with
    ``/etc/pki/CA/cacert.pem``. Since 3.13."""

    tls_cacrl: Annotated[StrPath, Field(one(check.host_file), since=(3, 13))]
    """List of revoked certificates, as PEM. By default ``/etc/pki/CA/cacrl.pem``, if there is one. Since
    3.13."""

    tls_cert: Annotated[StrPath, Field(one(check.host_file), since=(3, 13))]
    """Certificate to show to the other end, as PEM; ``/etc/pki/criu/cert.pem`` by default. Since 3.13."""

    tls_key: Annotated[StrPath, Field(one(check.host_file), since=(3, 13))]
    """Private key of ``tls_cert``, as PEM; ``/etc/pki/criu/private/key.pem`` by default. Since 3.13."""

    tls_no_cn_verify: Annotated[bool, Field(one(check.flag), since=(3, 13))]
    """Do not compare the name in the peer's certificate with the address that was given here. A server
    compares with the address that it listens on, so it nearly always needs this. Off by default. Since
    3.13."""


class TransferOptions(TlsOptions, total=False):
    """Dump, lazy dump, pre-dump and page server."""

    parent_img: Annotated[StrPath, Field(one(check.path))]
    """Images of the dump before this one, for pages that have not changed since: a path that starts at the
    images directory, ``../1`` say. CRIU makes a symbolic link of it there, so an absolute path breaks when
    the images move. A dump needs ``track_mem`` with it."""


class PageServerAddressOptions(TypedDict, total=False):
    """Dump, pre-dump and page server."""

    page_server: Annotated[tuple[str, int], Field(f.page_server, wire="ps")]
    """Address and port: where a dump sends its pages, or where a page server listens. A page server takes
    an IP address only, and with port 0 a free port, which the answer tells."""

    ps_socket: Annotated[int | HasFileno, Field(f.ps_socket, swrk_only=True, wire="ps")]
    """A connected socket in the place of ``page_server``. The worker inherits it, so this needs a worker of
    our own. TLS works on it in a page server only."""


class StatusFdOptions(TypedDict, total=False):
    """Lazy dump and page server."""

    status_fd: Annotated[int | HasFileno, Field(f.status_fd)]
    """The writing end of a pipe, into which CRIU writes one NUL byte when it is ready for a connection.
    CRIU calls it obsolete since 3.15 and recommends the notification status-ready, but it works."""


class StopOptions(TypedDict, total=False):
    """Dump, lazy dump and pre-dump: what has to do with stopping tasks and finding their memory."""

    track_mem: Annotated[bool, Field(one(check.flag))]
    """Let the kernel track which pages change from now on, so that the next dump, with this one as its
    ``parent_img``, writes only those. Off by default, except for a pre-dump, which always does it."""

    timeout: Annotated[int, Field(one(check.integer(0, check.UINT32_MAX // 1000, "seconds")))]
    """Seconds that stopping the tasks may take, 10 by default. 0 sets no limit, or 10 seconds while a
    ``freeze_cgroup`` freezes."""

    freeze_cgroup: Annotated[StrPath, Field(one(check.host_directory))]
    """Directory of a cgroup that holds the tasks: freeze it rather than seize each task, which is faster
    and lets no fork slip through. For cgroup v1 one of the freezer's hierarchy."""

    force_irmap: Annotated[bool, Field(one(check.flag))]
    """Look for the paths of inotify and fanotify watches by scanning the file system, even where a file
    handle would do. Off by default."""

    irmap_scan_paths: Annotated[Sequence[StrPath], Field(many(check.absolute))]
    """Further paths, absolute in the tasks' mount namespace, where that scan looks before its own few."""

    pidfd_store_sk: Annotated[int | HasFileno, Field(f.pidfd_store_sk, since=(3, 16))]
    """A Unix datagram socket, unbound at first, in which CRIU keeps a pidfd of each task from one dump of a
    chain to the next, to notice when a pid was used again. Give the same socket to each of the chain.
    Since 3.16, for kernels from 5.6 on."""


class CpuOptions(TypedDict, total=False):
    """Dump, lazy dump, restore and cpuinfo."""

    cpu_cap: Annotated[Collection[CpuCapability], Field(f.cpu_cap)]
    """Write the CPU's features into the images of a dump, or compare with them on a restore: "fpu" for the
    FPU's state, "ins" for instructions, "cpu" for all features being equal, "all", or "none". A restore
    that is given this needs images that were dumped with it, even for "none". Without it, CRIU looks at
    what the images of each task say of the FPU."""


class TaskOptions(TypedDict, total=False):
    """Dump, lazy dump and restore: what both sides must agree on, mostly."""

    root: Annotated[StrPath, Field(one(check.path))]
    """Root file system of the restored mount namespace: a mount point on the host, needed where the images
    have a mount namespace. On a dump it only serves to understand aufs."""

    shell_job: Annotated[bool, Field(one(check.flag))]
    """Allow a tree whose root does not lead its session, with the terminal it shares with its shell. The
    restored root joins CRIU's own session and terminal. Off by default; needed on both sides."""

    tcp_established: Annotated[bool, Field(one(check.flag))]
    """Dump or restore TCP connections in the state that they are in; the network stays locked in between.
    Off by default, and then one connection is enough to fail; needed on both sides."""

    tcp_close: Annotated[bool, Field(one(check.flag), since=(3, 12))]
    """Do not keep TCP connections: they are closed in the restored tasks. Wins over ``tcp_established``.
    Off by default; from 3.15 on, a restore needs it if the dump had it. Since 3.12."""

    file_locks: Annotated[bool, Field(one(check.flag))]
    """Dump or restore file locks. Right only where no task outside of the tree takes part in them. Off by
    default, and then one lock is enough to fail; needed on both sides."""

    ext_unix_sk: Annotated[bool, Field(one(check.flag))]
    """Allow datagram sockets that are connected to a Unix socket outside of the tree, and connect them
    again by name. Off by default; needed on both sides."""

    ext_mnt: Annotated[Mapping[str, str], Field(f.ext_mnt)]
    """Bind mounts from outside of the tree. Dump: mount point in the tree to a name of your choice.
    Restore: that name to the path on the host."""

    auto_ext_mnt: Annotated[bool, Field(one(check.flag))]
    """Find bind mounts from outside of the tree by comparing with CRIU's own mounts, and mount them from
    the same place again. Off by default; needed on both sides."""

    external: Annotated[Sequence[str], Field(f.externals)]
    """Resources outside of the tree, in CRIU's notation; ``criupy.rpc.external`` has functions that make
    these strings. Network namespaces since 3.11, pid namespaces since 3.15."""

    empty_ns: Annotated[EmptyNamespace, Field(one(check.choice(types.EMPTY_NAMESPACE)))]
    """"net": do not dump what is inside the network namespace, or restore an empty one, to be filled in the
    hook setup_namespaces."""

    manage_cgroups: Annotated[bool, Field(one(check.flag))]
    """The older way to say ``manage_cgroups_mode``: True is "soft", False is "ignore"."""

    manage_cgroups_mode: Annotated[CgroupsMode, Field(one(check.choice(types.CGROUPS_MODE)))]
    """What to do about cgroups. A dump distinguishes only "ignore" from the others. A restore with "none"
    or "props" needs the cgroups to exist and restores no properties or all; "soft", CRIU's default, makes
    missing ones and restores properties of those; "full" makes missing ones and restores properties of
    all; "strict" needs that none exists. "default" is CRIU's default."""

    cg_root: Annotated[Mapping[str, str], Field(f.cg_root)]
    """Controllers ("" for all that are not named) to cgroup paths: the cgroup that a dump takes for the
    tree's topmost one, or under which a restore puts it."""

    cgroup_yard: Annotated[StrPath, Field(one(check.host_directory), since=(3, 14))]
    """Directory where each cgroup hierarchy is mounted under the names of its controllers, joined with
    commas ("unified" for v2), so that CRIU need not mount them. Since 3.14."""

    orphan_pts_master: Annotated[bool, Field(one(check.flag))]
    """Allow one pseudoterminal whose master is outside of the tree. A restore makes a new master and hands
    its descriptor to the hook of the same name. Off by default; needed on both sides."""


class EndStateOptions(TypedDict, total=False):
    """Dump and restore."""

    leave_stopped: Annotated[bool, Field(one(check.flag), since=(3, 19))]
    """Leave the tasks stopped, as SIGSTOP does: dumped ones in the place of being killed, restored ones in
    the place of running. Off by default. Over RPC since 3.19."""


class FullDumpOptions(TypedDict, total=False):
    """Dump and lazy dump."""

    evasive_devices: Annotated[bool, Field(one(check.flag))]
    """Take another path to a device file if the one that it was opened under is gone. Off by default."""

    link_remap: Annotated[bool, Field(one(check.flag))]
    """Keep open files that were unlinked but have other names alive with a temporary link beside them.
    Off by default, and then such a file fails the dump."""

    ghost_limit: Annotated[int, Field(one(check.integer(0, check.UINT32_MAX, "bytes")))]
    """Bytes of an unlinked file up to which it is copied into the images, 1 MiB by default; a larger one
    fails the dump."""

    tcp_skip_in_flight: Annotated[bool, Field(one(check.flag))]
    """Leave out TCP connections that are not yet accepted, where the dump would fail for them; the client
    has to connect again. Off by default."""

    network_lock: Annotated[
        NetworkLock,
        Field(one(check.choice(types.NETWORK_LOCK), since={"skip": (3, 19)}), since=(3, 16)),
    ]
    """How to keep packets from connections that are being dumped: "iptables" (the default of most builds),
    "nftables", or "skip", which leaves it to you. A restore does what its images say. Since 3.16, "skip"
    since 3.19."""

    skip_mnt: Annotated[Sequence[StrPath], Field(many(check.path))]
    """Mount points in the tree that are left out of the dump."""

    enable_fs: Annotated[Sequence[str], Field(many(check.text))]
    """File systems that CRIU does not know, by name ("all" for any): mount them anew with the options that
    they have now. Whether that restores them, only you can know."""

    ext_sharing: Annotated[bool, Field(one(check.flag))]
    """With ``auto_ext_mnt``, take mounts that are shared with the host too. Off by default."""

    ext_masters: Annotated[bool, Field(one(check.flag))]
    """With ``auto_ext_mnt``, take slave mounts too, whose master is on the host. Off by default."""

    unix_sk_ino: Annotated[Sequence[int], Field(f.unix_sk_ino)]
    """Inodes of nameless Unix sockets whose other end, outside of the tree, may be lost. The same as
    ``external.unix(inode)``."""

    cgroup_props: Annotated[str, Field(one(check.text))]
    """Properties of cgroups to save besides those that CRIU knows, in its small dialect of YAML."""

    cgroup_props_file: Annotated[StrPath, Field(one(check.host_path))]
    """The same from a file, read after ``cgroup_props``."""

    cgroup_dump_controller: Annotated[Sequence[str], Field(many(check.text))]
    """The only controllers to dump; by default all that the tasks are in."""


class DumpOptions(
    CommonOptions,
    ImageOptions,
    StatisticsOptions,
    TransferOptions,
    PageServerAddressOptions,
    StopOptions,
    CpuOptions,
    TaskOptions,
    EndStateOptions,
    FullDumpOptions,
    total=False,
):
    """Options of a dump."""

    leave_running: Annotated[bool, Field(one(check.flag))]
    """Let the tasks go on after the dump; by default they are killed. What they do to files and
    connections from then on, the images do not know."""


class LazyDumpOptions(
    CommonOptions,
    ImageOptions,
    StatisticsOptions,
    TransferOptions,
    StatusFdOptions,
    StopOptions,
    CpuOptions,
    TaskOptions,
    FullDumpOptions,
    total=False,
):
    """Options of a lazy dump, whose pages stay in memory until the other side fetches them.

    Its address is an argument of the call; its tasks always end with it.
    """


class PreDumpOptions(
    CommonOptions,
    ImageOptions,
    StatisticsOptions,
    TransferOptions,
    PageServerAddressOptions,
    StopOptions,
    total=False,
):
    """Options of a pre-dump."""

    pre_dump_mode: Annotated[PreDumpMode, Field(one(check.choice(types.PRE_DUMP_MODE)), since=(3, 14))]
    """How memory is read: "splice" (the default) while the tasks are stopped, from inside of them, or
    "read" after they run again, with process_vm_readv, which stops them more briefly and needs less
    memory. Since 3.14."""


class RestoreOptions(
    CommonOptions, ImageOptions, StatisticsOptions, CpuOptions, TaskOptions, EndStateOptions, total=False
):
    """Options of a restore."""

    rst_sibling: Annotated[bool, Field(one(check.flag), swrk_only=True)]
    """Make the root task a child of the process that started the worker, rather than of the worker. Needs
    a worker of our own. Off by default."""

    exec_cmd: Annotated[Sequence[str], Field(f.exec_cmd)]
    """A program, looked up in PATH, and its arguments, into which the worker turns after the restore, with
    the log as its output: a parent for the restored task."""

    inherit_fd: Annotated[Mapping[str, int | HasFileno], Field(f.inherit_fd, swrk_only=True)]
    """Resources of the images to descriptors that take their place; ``criupy.rpc.external.key_of`` tells
    the key of an open one, a regular file's is its path without the first slash. The worker inherits
    them, so this needs a worker of our own."""

    join_ns: Annotated[Sequence[JoinNs], Field(f.join_ns)]
    """Namespaces that exist, for the tasks to be restored into."""

    veths: Annotated[Mapping[str, str], Field(f.veths)]
    """Names of veth devices in the tree to the names of their ends on the host, ``outer@bridge`` to attach
    that to a bridge. The same as ``external.veth(inner, outer, bridge)``."""

    weak_sysctls: Annotated[bool, Field(one(check.flag))]
    """Skip network sysctls that this kernel does not have. Off by default."""

    lsm_profile: Annotated[str, Field(one(check.lsm_profile), since=(3, 12))]
    """Security profile for the restored tasks, "apparmor:PROFILE" or "selinux:LABEL"; by default the one
    that they had. Since 3.12."""

    lsm_mount_context: Annotated[str, Field(one(check.text), since=(3, 16))]
    """SELinux context that replaces the ``context=`` of mounts which have one. Since 3.16."""

    mntns_compat_mode: Annotated[bool, Field(one(check.flag), since=(3, 17))]
    """Restore mounts with the older engine, which CRIU also falls back to on kernels before 5.15. Off by
    default. Since 3.17."""

    skip_file_rwx_check: Annotated[bool, Field(one(check.flag), since=(3, 18))]
    """Do not compare the permissions of files with those at the dump. Off by default. Since 3.18."""


class LazyRestoreOptions(RestoreOptions, TlsOptions, total=False):
    """Options of a lazy restore. Those of TLS are for its daemon's connection to ``page_server``."""


class PageServerOptions(
    CommonOptions, ImageOptions, TransferOptions, PageServerAddressOptions, StatusFdOptions, total=False
):
    """Options of a page server."""


class CheckOptions(CommonOptions, total=False):
    """Options of a check, which CRIU before 3.11 does not read."""


class CpuinfoOptions(CommonOptions, CpuOptions, total=False):
    """Options of dumping the CPU's features, and of comparing with them."""
