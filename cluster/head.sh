#!/usr/bin/env bash
# One box: a Ray head that takes jobs with a token only, and whose dashboard is on loopback unless told otherwise.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster/head.sh [options of `ray start`]

Starts a Ray head on this machine for `ray job submit`, or for other machines to join. Token authentication is on.
The dashboard, which takes the jobs, listens on 127.0.0.1; with --dashboard-host HOST elsewhere, but only if a token
exists already: RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. On loopback a missing token
is made and kept in ~/.ray/auth_token. Whoever submits needs the same token and RAY_AUTH_MODE=token.

With --block it runs until it is interrupted, and ends the Ray processes that it started.
TEXT
}

host=127.0.0.1
before=
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit 0
        ;;
    --dashboard-host=*) host=${argument#*=} ;;
    esac
    if [ "$before" = --dashboard-host ]; then host=$argument; fi
    before=$argument
done

make=()
case "$host" in
127.0.0.1 | localhost | ::1) make=(--generate) ;;
esac

export RAY_AUTH_MODE=token
# What runs on a hospital's machines is nobody else's business.
export RAY_USAGE_STATS_ENABLED=0
# A stopped job has 3 seconds otherwise, too few to save a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"

# Ray itself would make the file readable to everybody on this machine.
if ! (umask 077 && ray get-auth-token "${make[@]}") >/dev/null 2>&1; then
    echo "head.sh: there is no token, and whoever reaches the dashboard on $host could run code here: give a token in" \
        "RAY_AUTH_TOKEN or in a file that RAY_AUTH_TOKEN_PATH names (neither may be empty), or make one with" \
        "\`ray get-auth-token --generate\`" >&2
    exit 1
fi
# The last of two equal options counts, so one in "$@" does; it is the one that was checked.
exec ray start --head --dashboard-host="$host" "$@"
