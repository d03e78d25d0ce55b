# Bookinfo in Kubernetes: Mica by its manifests, the workloads by theirs, with agents by `mica inject`.

export MICA_CLUSTER=${cluster:-$state/cluster}
declare -gA addresses=()

start_all() {
    local program name
    program=$(mica_program)
    mkdir -p "$state/logs"
    cluster up >/dev/null
    logged images make_images "$program"

    # As a user of kustomize adds arguments to Mica's.
    ln -sfn "$checkout/manifests" "$state/manifests"
    cat >"$state/kustomization.yaml" <<YAML
resources: [manifests]
patches:
- target: {kind: Deployment, name: mica}
  patch: |
    - { op: add, path: /spec/template/spec/containers/0/args/-, value: "--ttl=$ttl" }
    - { op: add, path: /spec/template/spec/containers/0/args/-, value: "--trace-zipkin=http://zipkin.telemetry.svc:9411" }
YAML
    kubectl apply --kustomize "$state" >/dev/null
    kubectl kustomize "$here" |
        "$program" inject --mode agent --metrics-address 0.0.0.0:15020 --trace-zipkin http://zipkin.telemetry.svc:9411 -f - |
        kubectl apply --filename - >/dev/null
    logged telemetry-images make_telemetry_images
    kubectl apply --kustomize "$checkout/examples/telemetry" >/dev/null
    rolled_out istio-system mica
    for name in "${workloads[@]}"; do
        rolled_out bookinfo "$(deployment_of "$name")"
    done
    rolled_out telemetry prometheus
    rolled_out telemetry zipkin
}

# logged NAME COMMAND...
logged() {
    local log=$state/logs/$1 status
    shift
    # Not `"$@" || …`: in a condition `set -e` does not hold.
    set +e
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    [[ $status == 0 ]] || fail "$1 has failed: see $log"
}

cluster() {
    "$checkout/tests/cluster" "$@"
}

kubectl() {
    cluster kubectl "$@"
}

rolled_out() {
    kubectl rollout status --namespace "$1" "deployment/$2" --timeout 180s >/dev/null || {
        kubectl get pods,events --all-namespaces --output wide >&2
        fail "$2 is not there after three minutes"
    }
}

# There is no registry: all that pods are made of comes from this machine.
make_images() {
    local program=$1
    "$checkout/packaging/image" --name localhost/mica:0.1.0 "$program" "$state/mica.tar"
    cluster image "$state/mica.tar"
    rm "$state/mica.tar"
    cluster image localhost/bookinfo:1 "$(services_program)"
    has_image localhost/envoy:1.40.0 || cluster image localhost/envoy:1.40.0 "$(part envoy)"
}

make_telemetry_images() {
    has_image localhost/prometheus:2.42 || cluster image localhost/prometheus:2.42 "$(part prometheus)"
    if ! has_image localhost/zipkin:3.6.1; then
        rm -rf "$state/zipkin"
        make_zipkin_folder "$state/zipkin"
        cluster image localhost/zipkin:3.6.1 "$state/zipkin" /zipkin/zipkin
        rm -r "$state/zipkin"
    fi
}

has_image() {
    cluster exec ctr --namespace k8s.io images list -q | grep -qx "$1"
}

# The part, Java with its settings, which lie below /etc, the libraries that Java is linked to, and a shell for the part's
# script.
make_zipkin_folder() {
    local folder=$1 java home
    part java >/dev/null
    java=$(readlink -f "$(command -v java)")
    home=${java%/bin/java}
    mkdir -p "$folder"/{bin,usr/bin,zipkin,tmp}
    cp "$(dirname "$(part zipkin)")"/* "$folder/zipkin/"
    cp "$(command -v busybox)" "$folder/bin/"
    ln -s busybox "$folder/bin/sh"
    ln -s /bin/busybox "$folder/usr/bin/dirname"
    ln -s /bin/busybox "$folder/usr/bin/readlink"
    ln -s "$java" "$folder/usr/bin/java"
    tar --create --file - --absolute-names "$home" /etc/java* 2>/dev/null | tar --extract --directory "$folder" 2>/dev/null
    # Some are for screens, which are not there.
    { find "$home" -name '*.so' -exec ldd "$java" {} + || true; } | sed -n 's/.*=> \(.*\) (0x.*/\1/p; s/^\t\(\/[^ ]*\) (0x.*/\1/p' | sort -u |
        grep -v "^$home/" | xargs cp --dereference --parents --target-directory "$folder"
}

# A deployment is called after a service and a version.
deployment_of() {
    case $1 in
        reviews-*) echo "$1" ;;
        *) echo "$1-v1" ;;
    esac
}

# Pods get others with each start.
learn_addresses() {
    local pod address
    while read -r pod address; do
        pod=${pod%-*-*}
        [[ $pod == reviews-* ]] || pod=${pod%-v1}
        addresses[$pod]=$address
    done < <(kubectl get pods --namespace bookinfo --field-selector status.phase=Running \
        --output 'jsonpath={range .items[*]}{.metadata.name} {.status.podIP}{"\n"}{end}')
    door=http://$(address_of_service bookinfo productpage):8000
    zipkin=http://$(address_of_service telemetry zipkin):9411
    prometheus=http://$(address_of_service telemetry prometheus):9090
    # The way to a service is made a moment after its pod is ready.
    wait_for 90 "the page" nearby curl --silent --fail "$door"
}

address_of() {
    echo "${addresses[$1]:?there is no pod of $1}"
}

address_of_service() {
    kubectl get service --namespace "$1" "$2" --output 'jsonpath={.spec.clusterIP}'
}

stop_all() {
    if [[ -z $cluster ]]; then
        cluster reset
        return
    fi
    kubectl delete namespace bookinfo telemetry --ignore-not-found >/dev/null
    kubectl delete --kustomize "$state" --ignore-not-found >/dev/null
}

any_running() {
    kubectl get namespace bookinfo
} >/dev/null 2>&1

# What a workload's service would be answered, by way of its Envoy. ask WORKLOAD HOST/PATH...
ask() {
    local name=$1
    shift
    kubectl exec --namespace bookinfo "deployment/$(deployment_of "$name")" --container "$(service_of "$name")" -- \
        /usr/bin/bookinfo ask 127.0.0.1:8080 "$@"
}

# Runs a command where the workloads' addresses can be reached.
nearby() {
    cluster exec "$@"
}

page_load() {
    nearby "$state/bookinfo" load "${door#http://}" productpage/
}

set_weights() {
    {
        printf 'data:\n  outbound.yaml: |\n'
        with_weights "$@" <"$here/sidecar/outbound.yaml" | sed 's/^/    /'
    } >"$state/weights.yaml"
    kubectl patch configmap --namespace bookinfo sidecar --patch-file "$state/weights.yaml" >/dev/null
}

look_around() {
    local forward="MICA_CLUSTER=$MICA_CLUSTER tests/cluster forward"
    cat <<TEXT

export KUBECONFIG=$MICA_CLUSTER/admin.kubeconfig

The page        $forward ${door#http://} says where; then /productpage
Spans           $forward ${zipkin#http://}
Metrics         $forward ${prometheus#http://}
Certificates    kubectl logs --namespace bookinfo deployment/details-v1 --container mica-agent
Envoys          kubectl logs --namespace bookinfo deployment/details-v1 --container istio-proxy
Other weights   examples/bookinfo/weights --cluster 0 20 80
The end         examples/bookinfo/down --cluster
TEXT
}
