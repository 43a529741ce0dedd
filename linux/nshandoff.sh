#!/bin/sh -p
# The command `nshandoff`: starts Python so that settings that are meant for a job do nothing to it.
# What they were is handed on in variables: linux/launch.py takes them over.

unset LD_AUDIT LD_BIND_NOT LD_BIND_NOW LD_DEBUG LD_DEBUG_OUTPUT LD_DYNAMIC_WEAK LD_LIBRARY_PATH \
    LD_ORIGIN_PATH LD_POINTER_GUARD LD_PREFER_MAP_32BIT_EXEC LD_PRELOAD LD_PROFILE LD_PROFILE_OUTPUT \
    LD_SHOW_AUXV LD_TRACE_LOADED_OBJECTS LD_USE_LOAD_BIAS LD_VERBOSE LD_WARN \
    GCONV_PATH GLIBC_TUNABLES LOCPATH NLSPATH MALLOC_ARENA_MAX MALLOC_ARENA_TEST MALLOC_CHECK_ \
    MALLOC_MMAP_MAX_ MALLOC_MMAP_THRESHOLD_ MALLOC_PERTURB_ MALLOC_TOP_PAD_ MALLOC_TRACE \
    MALLOC_TRIM_THRESHOLD_
PATH=/usr/bin:/bin

verb=${1-}
# Where something fails, sh itself exits with a code of its own.
trap 'case $verb in run | exec) exit 125 ;; *) exit 3 ;; esac' EXIT

fail() {
    echo "nshandoff: $1" >&2
    exit
}

here=$0
[ ! -h "$here" ] || here=$(readlink -f -- "$0")
case $here in */*) here=${here%/*} ;; *) here=. ;; esac
for python in "$here/python" "$here/python3" ''; do [ ! -x "$python" ] || break; done
[ -n "$python" ] || fail "there is no python in $here; install it into an environment of its own"

NSHANDOFF_IGNORED=
while read -r name value; do
    [ "$name" != SigIgn: ] || NSHANDOFF_IGNORED=$value
done 2>/dev/null </proc/$$/status
[ -n "$NSHANDOFF_IGNORED" ] || fail "/proc/$$/status cannot be read; it needs /proc"
export NSHANDOFF_IGNORED

# In hexadecimal, because sh cannot hold a NUL and leaves out names that are none of its own.
parts=$(od -An -v -tx1 -w32768 /proc/$$/environ) || fail "/proc/$$/environ cannot be read"
IFS='
'
number=0
for part in $parts; do
    number=$((number + 1))
    export "NSHANDOFF_ENVIRONMENT_$number=$part"
done
unset "NSHANDOFF_ENVIRONMENT_$((number + 1))"

exec "$python" -I -X utf8 -m linux "$@"
