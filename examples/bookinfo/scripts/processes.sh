# Bookinfo as plain processes. Each service has a loopback address of its own, with its Envoy and its agent, and on it the
# ports that they would have in a pod.

shared=$network.10
door=http://$network.1:8000
zipkin=http://$shared:9411
prometheus=http://$shared:9090
mica_metrics=$shared:15014

address_of() {
    local number=1 name
    for name in "${workloads[@]}"; do
        [[ $name != "$1" ]] || { echo "$network.$number" && return; }
        number=$((number + 1))
    done
    fail "there is no workload $1"
}

# They are the same each time.
learn_addresses() {
    :
}

start_all() {
    local name services zipkin_program prometheus_program
    mkdir -p "$state"/{run,logs}
    mica=$(mica_program)
    services=$(services_program)
    envoy=$(part envoy)
    part java >/dev/null
    zipkin_program=$(part zipkin)
    prometheus_program=$(part prometheus)

    start zipkin env "JAVA_OPTIONS=-Djava.io.tmpdir=$state/run" "$zipkin_program" "--armeria.ports[0].ip=$shared" \
        '--armeria.ports[0].port=9411' '--armeria.ports[0].protocols[0]=http'
    start mica "$mica" serve "$here" --data-dir "$state/mica" --ttl "$ttl" --trial-tokens \
        --grpc-address "$shared:15012" --http-address "$mica_metrics" --trace-zipkin "$zipkin"
    wait_for 90 "Mica; see $state/logs/mica" curl --silent --fail "http://$mica_metrics/readyz"
    for name in "${workloads[@]}"; do
        start_workload "$name" "$services"
    done
    write_scrapes >"$state/prometheus.yaml"
    start prometheus "$prometheus_program" --config.file "$state/prometheus.yaml" --web.listen-address "$shared:9090" \
        --storage.tsdb.path "$state/prometheus"
    for name in "${workloads[@]}"; do
        wait_for 90 "the Envoy of $name; see $state/logs/envoy-$name" \
            curl --silent --fail "http://$(address_of "$name"):9902/ready"
    done
    wait_for 90 "the page" curl --silent --fail "$door"
    wait_for 90 "Zipkin; see $state/logs/zipkin" curl --silent --fail "$zipkin/health"
}

# A service, its agent and its Envoy.
start_workload() {
    local name=$1 services=$2 address service settings=$state/sidecars/$1 more=()
    address=$(address_of "$name")
    service=$(service_of "$name")
    mkdir -p "$settings/callers"
    as_process "$name" <"$here/sidecar/bootstrap.yaml" >"$settings/bootstrap.yaml"
    [[ -e $settings/outbound.yaml ]] || cp "$here/sidecar/outbound.yaml" "$settings/"
    cp "$here/sidecar/callers/$service.yaml" "$settings/callers/callers.yaml"

    start "$name" env "LISTEN=$address:9080" "OUTBOUND=$address:8080" "VERSION=${name#"$service"-}" \
        "STARS=$(stars_of "$name")" "$services" "$service"

    # Good for an hour, and for the first certificate: with that one the agent gets the next.
    is_running "agent-$name" || "$mica" token new "bookinfo/$name" --data-dir "$state/mica" --ttl 1h --force --out "$settings/token" >/dev/null
    start "agent-$name" "$mica" agent --authority-address "$shared:15012" --authority-name localhost \
        --authority-roots "$state/mica/root-cert.pem" --token-file "$settings/token" --certificate "$settings/certificate" \
        --socket "$settings/agent.sock" --http-address "$address:15020" --trace-zipkin "$zipkin"

    [[ $name != productpage ]] || more=(--config-yaml "$(as_process "$name" <"$here/sidecar/door.yaml")")
    start "envoy-$name" "$envoy" --config-path "$settings/bootstrap.yaml" "${more[@]}" --service-node "$name" \
        --service-cluster "$service" --concurrency 1 --disable-hot-restart --log-level warning
}

# An Envoy's settings with the addresses and paths of a process instead of those of a pod.
as_process() {
    local name=$1 address edits=() other
    address=$(address_of "$name")
    for other in "${workloads[@]}"; do
        edits+=(-e "s/\b$other\.bookinfo\.svc\.cluster\.local\b/$(address_of "$other")/g")
    done
    sed "${edits[@]}" -e "s/\bzipkin\.telemetry\.svc\.cluster\.local\b/$shared/g" \
        -e "s/\b0\.0\.0\.0\b/$address/g" -e "s/\b127\.0\.0\.1\b/$address/g" \
        -e "s|/etc/envoy|$state/sidecars/$name|g" -e "s|/etc/callers|$state/sidecars/$name/callers|g" \
        -e "s|/run/mica/agent.sock|$state/sidecars/$name/agent.sock|g"
}

write_scrapes() {
    echo "global: { scrape_interval: 1s, scrape_timeout: 1s }"
    echo "scrape_configs:"
    echo "- { job_name: mica, static_configs: [{ targets: ['$mica_metrics'] }] }"
    echo "- { job_name: agent, static_configs: [$(targets 15020)] }"
    echo "- { job_name: envoy, metrics_path: /stats/prometheus, static_configs: [$(targets 9902)] }"
}

targets() {
    local name
    for name in "${workloads[@]}"; do
        echo "{ targets: ['$(address_of "$name"):$1'], labels: { workload: $name } },"
    done
}

# start NAME COMMAND...
start() {
    local name=$1
    shift
    ! is_running "$name" || return 0
    setsid "${leash[@]}" "$@" >"$state/logs/$name" 2>&1 </dev/null &
    echo "$! $(birth_of $!)" >"$state/run/$name.process"
    disown
}

# Of the process that was started, not of a later one with its number.
is_running() {
    local number birth
    read -r number birth 2>/dev/null <"$state/run/$1.process" && [[ -n $birth && $(birth_of "$number") == "$birth" ]]
}

birth_of() {
    sed 's/.*) //' 2>/dev/null <"/proc/$1/stat" | cut -d ' ' -f 20
}

stop_all() {
    local file name number birth attempt
    for signal in TERM KILL; do
        for file in "$state"/run/*.process; do
            name=$(basename "$file" .process)
            is_running "$name" || continue
            read -r number birth <"$file"
            kill "-$signal" "$number" 2>/dev/null || true
        done
        for attempt in {1..50}; do
            any_running || break 2
            sleep 0.1
        done
    done
    rm -rf "$state/run" "$state/prometheus"
}

any_running() {
    local file
    for file in "$state"/run/*.process; do
        ! is_running "$(basename "$file" .process)" || return 0
    done
    return 1
}

# What a workload's service would be answered, by way of its Envoy. ask WORKLOAD HOST/PATH...
ask() {
    local name=$1
    shift
    "$state/bookinfo" ask "$(address_of "$name"):8080" "$@"
}

# Runs a command where the workloads' addresses can be reached.
nearby() {
    "$@"
}

page_load() {
    "$state/bookinfo" load "${door#http://}" productpage/
}

set_weights() {
    local name settings
    for name in "${workloads[@]}"; do
        settings=$state/sidecars/$name
        with_weights "$@" <"$settings/outbound.yaml" >"$settings/.outbound.yaml"
        mv "$settings/.outbound.yaml" "$settings/outbound.yaml"
    done
}

look_around() {
    cat <<TEXT

The page        $door/productpage
Spans           $zipkin
Metrics         $(dirname "$(part prometheus)")/promtool query instant $prometheus up
Certificates    http://$(address_of details):9901/certs has those of details' Envoy; logs are in $state/logs
Other weights   examples/bookinfo/weights 0 20 80
The end         examples/bookinfo/down
TEXT
}
