# What has to hold, however Bookinfo runs.

callees=(productpage details reviews ratings)

check_all() {
    check_page
    check_mutual_tls
    check_callers
    check_change
    check_issuance
    check_metrics
    echo "all of it holds"
}

good() {
    printf 'ok  %s\n' "$*"
}

check_page() {
    local html json
    html=$(nearby curl --silent --fail --header 'accept: text/html' "$door/productpage") || fail "$door gives no page"
    [[ $html == *"<h1>The Comedy of Errors</h1>"*Shakespeare*reviews\ v[123]* ]] || fail "the page is not whole: $html"
    json=$(nearby curl --silent --fail "$door/productpage") || fail "$door gives no JSON"
    [[ $json == *'"details": {"author": "William Shakespeare"'*'"version": "v'[123]'"'* ]] || fail "the JSON is not whole: $json"
    good "the page is put together of what productpage, details and reviews say, as HTML and as JSON"
}

# Every connection between workloads begins with a handshake in which both show a certificate.
check_mutual_tls() {
    local name address shown
    for name in "${workloads[@]}"; do
        address=$(address_of "$name"):8443
        shown=$(shown_by "$name" -ext subjectAltName)
        [[ $shown == *URI:spiffe://cluster.local/ns/bookinfo/sa/"$name" ]] || fail "$name shows another identity: $shown"
        ! nearby curl --silent --max-time 5 "http://$address/" >/dev/null || fail "$name answers without TLS"
        ! nearby curl --silent --max-time 5 --insecure "https://$address/" >/dev/null || fail "$name answers who has no certificate"
        [[ $(stat_of "$name" envoy_listener_ssl_no_certificate) == 0 ]] || fail "$name took a connection without a certificate"
    done
    good "each of ${#workloads[@]} sidecars shows its own identity, and answers neither plain HTTP nor who has no certificate"
}

# Who may call whom: everybody asks everybody, each with its own certificate.
check_callers() {
    local caller callee answers expected found pages=() refused=0 let_in=0
    for callee in "${callees[@]}"; do
        pages+=("$callee/$([[ $callee == productpage ]] || echo "$callee")")
    done
    for caller in "${workloads[@]}"; do
        answers=$(ask "$caller" "${pages[@]}")
        for callee in "${callees[@]}"; do
            case "$caller > $callee" in
                "productpage > details" | "productpage > reviews" | "reviews-v2 > ratings" | "reviews-v3 > ratings")
                    expected=200 && let_in=$((let_in + 1))
                    ;;
                *) expected=403 && refused=$((refused + 1)) ;;
            esac
            found=$(sed -nE "s|^([0-9]{3}) $callee/.*|\1|p" <<<"$answers")
            [[ $found == "$expected" ]] || fail "$caller asked $callee and was answered $found instead of $expected"
        done
    done
    good "of $((let_in + refused)) pairs of caller and callee $let_in are let in (200), and $refused refused by their identity (403)"
}

# Other weights, other certificates, and not one failed request meanwhile.
check_change() {
    local name said
    declare -A before
    for name in "${workloads[@]}"; do before[$name]=$(shown_by "$name" -serial); done
    coproc LOAD { page_load; }
    local answers=${LOAD[0]} end=${LOAD[1]} load=$LOAD_PID

    set_weights 80 20 0
    wait_for 90 "reviews v1 and v2 alone" only v1 v2
    good "80 of 100 requests go to reviews v1, 20 to v2"
    set_weights 40 20 40
    wait_for 90 "reviews v1, v2 and v3" only v1 v2 v3
    set_weights 0 20 80
    wait_for 90 "reviews v2 and v3 alone" only v2 v3
    good "40 to v1, 20 to v2, 40 to v3; then none to v1, 20 to v2, 80 to v3"
    check_spans
    set_weights 80 20 0
    wait_for 90 "reviews v1 and v2 alone" only v1 v2
    good "and back"

    for name in "${workloads[@]}"; do
        wait_for 120 "another certificate of $name" has_another "$name" "${before[$name]}"
    done
    good "all ${#workloads[@]} sidecars show other certificates than at the beginning"
    eval "exec $end>&-"
    said=$(cat <&"$answers")
    wait "$load" || fail "requests failed under all this: $said"
    good "under load all the while: $said"
}

# The versions that answer, in 40 requests.
only() {
    local pages=() number found
    for number in {1..40}; do pages+=("productpage/productpage?$number"); done
    found=$(nearby "$state/bookinfo" ask "${door#http://}" "${pages[@]}" | grep -o '"version": "v[0-9]"' | sort -u | grep -o 'v[0-9]')
    [[ $found == "$(printf '%s\n' "$@")" ]]
}

has_another() {
    local serial
    serial=$(shown_by "$1" -serial) && [[ $serial != "$2" ]]
}

# One request with a name of its own, and the spans of four services under it.
check_spans() {
    local id span
    id=$(openssl rand -hex 16) span=$(openssl rand -hex 8)
    nearby curl --silent --fail --output /dev/null --header "x-b3-traceid: $id" --header "x-b3-spanid: $span" \
        --header 'x-b3-sampled: 1' "$door/productpage"
    wait_for 90 "spans of four services in Zipkin" has_spans "$id"
    good "Zipkin has spans of one request from productpage, details, reviews and ratings: $zipkin/zipkin/traces/$id"
}

has_spans() {
    local found
    found=$(nearby curl --silent --fail "$zipkin/api/v2/trace/$1" | grep -o '"localEndpoint":{"serviceName":"[a-z]*"' | sort -u)
    [[ $(grep -cE '"(productpage|details|reviews|ratings)"$' <<<"$found") == 4 ]]
}

# A new certificate: the agent's need, the authority's signature and the delivery to the Envoy are one trace.
check_issuance() {
    wait_for 120 "a trace from an agent's need to an Envoy's certificate in Zipkin" issuance
    good "Zipkin has the spans of a certificate's issuance, too: $zipkin/zipkin/traces/$(issuance)"
}

# The number of one.
issuance() {
    nearby curl --silent --fail "$zipkin/api/v2/traces?serviceName=mica&spanName=sign&limit=20" | sed 's/\],\[/\n/g' |
        has_span mica-agent certificate | has_span mica sign |
        has_span mica-agent envoy.service.secret.v3.secretdiscoveryservice/streamsecrets |
        sed -nE '1s/.*"traceId":"([0-9a-f]*)".*/\1/p' | grep .
}

# Of traces, one a line, those with a span of a service: has_span SERVICE NAME.
has_span() {
    grep -E "\"name\":\"$2\"[^}]*\"localEndpoint\":\{\"serviceName\":\"$1\"" || true
}

check_metrics() {
    local all=${#workloads[@]}
    wait_for 90 "Mica's metrics in Prometheus" is_answered 'sum(mica_certificates_issued_total) > 0'
    wait_for 90 "the metrics of all agents in Prometheus" is_answered "count(mica_agent_certificates_obtained_total > 0) >= $all"
    wait_for 90 "the metrics of all Envoys in Prometheus" is_answered "count(sum by (instance) (envoy_listener_ssl_handshake) > 0) >= $all"
    wait_for 90 "refusals in Prometheus" is_answered 'sum(envoy_http_rbac_denied) > 0'
    wait_for 90 "targets in Prometheus that are all up" is_answered 'min(up) == 1'
    good "Prometheus has the metrics of Mica, of $all agents and of $all Envoys: certificates, handshakes, and who was refused"
}

is_answered() {
    nearby curl --silent --fail --get --data-urlencode "query=$1" "$prometheus/api/v1/query" | grep -q '"value"'
}

# What openssl says of the certificate that a sidecar shows: shown_by WORKLOAD OPTION...
shown_by() {
    local name=$1
    shift
    { nearby openssl s_client -connect "$(address_of "$name"):8443" </dev/null 2>/dev/null || true; } | openssl x509 -noout "$@"
}

# A metric's sum over one Envoy.
stat_of() {
    nearby curl --silent --fail "http://$(address_of "$1"):9902/stats/prometheus" |
        awk -v name="$2" '$1 ~ "^" name "[{ ]" || $1 == name { sum += $NF } END { print sum + 0 }'
}
