#!/usr/bin/env bash
# One box: a Ray head that takes jobs with a token only, and that listens on loopback unless asked otherwise.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster/head.sh [options of `ray start`]

Starts a Ray head on this machine for `ray job submit`. Token authentication is on, and every port is on loopback.
--dashboard-host HOST puts the dashboard, which takes the jobs, elsewhere, but only if a token exists already:
RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. On loopback a missing token is made and kept
in ~/.ray/auth_token. Whoever submits needs the same token and RAY_AUTH_MODE=token. A token file that other users can
read is refused.

--node-ip-address ADDRESS lets other machines join: Ray's ports then listen on the network, all of them with the token,
and metrics, which would be served without it, are off.

With --block it runs until it is interrupted, and ends the Ray processes that it started.
TEXT
}

fail() {
    echo "head.sh: $*" >&2
    exit 1
}

is_loopback() {
    case "$1" in
    127.* | localhost | ::1) ;;
    *) return 1 ;;
    esac
}

host=127.0.0.1
node=127.0.0.1
block=
before=
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        usage
        exit 0
        ;;
    --block) block=yes ;;
    --dashboard-host=*) host=${argument#*=} ;;
    --node-ip-address=*) node=${argument#*=} ;;
    esac
    case "$before" in
    --dashboard-host) host=$argument ;;
    --node-ip-address) node=$argument ;;
    esac
    before=$argument
done

command -v ray >/dev/null ||
    fail "\`ray\` is not in PATH: activate the environment that has lgd, for example \`source .venv/bin/activate\`"

make=()
if is_loopback "$host"; then make=(--generate); fi

export RAY_AUTH_MODE=token
# What runs on a hospital's machines is nobody else's business.
export RAY_USAGE_STATS_ENABLED=0
# A stopped job has 3 seconds otherwise, too few to save a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"

if is_loopback "$node"; then
    # Ray takes loopback for the address of the network, on which it then listens, except where it expects one machine.
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
else
    # Metrics are served without the token. The two servers that have no switch fail to start at this port.
    export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
fi

file=${RAY_AUTH_TOKEN_PATH:-${HOME-}/.ray/auth_token}
if [ -z "${RAY_AUTH_TOKEN-}" ] && [ -s "$file" ] && [ -n "$(find -L "$file" -maxdepth 0 -perm /077)" ]; then
    fail "other users of this machine may open the token in $file: run \`chmod 600 $file\`; where somebody may have" \
        "read it, make a new one"
fi

# Ray itself would make the file readable to everybody on this machine.
if ! problem=$(umask 077 && ray get-auth-token "${make[@]}" 2>&1 >/dev/null); then
    case "$problem" in
    *AuthenticationError* | *"authentication token found"*)
        fail "there is no token, and whoever reaches the dashboard on $host could run code here: give a token in" \
            "RAY_AUTH_TOKEN or in a file that RAY_AUTH_TOKEN_PATH names (neither may be empty), or make one with" \
            "\`ray get-auth-token --generate\`"
        ;;
    *) fail "\`ray get-auth-token\` failed, so Ray does not work in this environment: $problem" ;;
    esac
fi
if [ -n "$block" ]; then
    echo "head.sh: Ctrl-C, or \`kill $$\`, ends this head and what it started, and no other Ray" >&2
else
    echo "head.sh: \`ray stop\` ends this head, and with it every Ray process on this machine that you may end; started" \
        "with --block a head ends alone, by Ctrl-C" >&2
fi
# The last of two equal options counts, so one in "$@" does; it is the one that was checked.
exec ray start --head --dashboard-host="$host" "$@"
