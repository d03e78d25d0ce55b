# What the commands of this example share. $here is the example's folder. All of them take --cluster first.

checkout=$(cd "$here/../.." && pwd)
mode=processes
state=${BOOKINFO:-${CARGO_TARGET_DIR:-$checkout/target}/bookinfo}
if [[ ${1:-} == --cluster ]]; then
    shift
    mode=cluster
    state=${BOOKINFO:-${CARGO_TARGET_DIR:-$checkout/target}/bookinfo-cluster}
fi
workloads=(productpage details ratings reviews-v1 reviews-v2 reviews-v3)
# What ends with the script, if it is one that stays.
leash=()

# How Bookinfo runs: as it was started.
load_mode() {
    local line
    [[ -e $state/settings ]] || fail "Bookinfo does not run; examples/bookinfo/up starts it"
    while read -r line; do declare -g "$line"; done <"$state/settings"
    source "$here/scripts/$mode.sh"
}

# The one program of all services, compiled again when it has changed.
services_program() {
    local program=$state/bookinfo
    if [[ ! $program -nt $here/main.rs ]]; then
        rustc --edition 2024 -C opt-level=1 "$here/main.rs" -o "$program.new"
        mv "$program.new" "$program"
    fi
    echo "$program"
}

# The one that was named, or the checkout's.
mica_program() {
    [[ -n $mica ]] || (cd "$checkout" && cargo build --release) >&2
    echo "${mica:-${CARGO_TARGET_DIR:-$checkout/target}/release/mica}"
}

part() {
    "$checkout/tests/parts/part" install "$1" | tail -n 1
}

# `reviews-v1` is a version of the service `reviews`.
service_of() {
    echo "${1%-v[0-9]}"
}

# The colour of the stars that a version of reviews shows.
stars_of() {
    case $1 in
        reviews-v2) echo black ;;
        reviews-v3) echo red ;;
        *) echo none ;;
    esac
}

# A copy of outbound.yaml with other weights.
with_weights() {
    sed -E "s/(reviews-v1, weight:) [0-9]+/\1 $1/; s/(reviews-v2, weight:) [0-9]+/\1 $2/; s/(reviews-v3, weight:) [0-9]+/\1 $3/"
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local seconds=$1 what=$2 begun=$SECONDS
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS - begun < seconds)) || fail "waited $seconds s for $what"
        sleep 0.1
    done
}

fail() {
    echo "bookinfo: $*" >&2
    exit 1
}
