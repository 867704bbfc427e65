#!/bin/sh
# image-check.sh: build the CPU image of the Dockerfile without Docker, start it, and send one chat and one score request.
#
# `make image-check` runs it as root on Debian; it needs no daemon. mmdebstrap makes a base image of Debian bookworm with
# Python 3.11, as in the real base image. buildah builds on it in a chroot, with this machine's apt sources and pip
# configuration. The image then starts as its unprivileged user with no capabilities, on a read-only root, with a writable
# cache volume and without a network. The check needs about 12 GB of disk and takes 15 minutes on two cores.
#
# IMAGE_CHECK_DIR=DIR keeps the work folder: a second run reuses the base image, and the logs remain.
set -eu
python=${PYTHON:-python3}
image=localhost/slimserve:image-check
ready_limit_s=900

print_status() { echo "image-check: $*" >&2; }

fail() {
    print_status "$1"
    [ -z "${2:-}" ] || tail -n 30 "$2" >&2
    exit 1
}

# --- The container. The script calls itself below with `--inside ROOT CACHE WORK` in separate namespaces. ---

inside() {
    root=$1 cache=$2 work=$3
    eval "$("$python" - "$work/image.json" <<'PYTHON'
import json, shlex, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
words = {
    "user": config["User"],
    "workdir": config["WorkingDir"],
    "environment": shlex.join(config["Env"]),
    "command": shlex.join(config["Entrypoint"] + config["Cmd"]),
    "health": shlex.join(config["Healthcheck"]["Test"][1:]),
}
print("\n".join(f"{name}={shlex.quote(text)}" for name, text in words.items()))
PYTHON
)"
    enter="chroot '$root' setpriv --reuid $user --regid $(chroot "$root" id -g "$user") --clear-groups --no-new-privs \
        --bounding-set=-all --inh-caps=-all -- /usr/bin/env -i --chdir='$workdir' $environment"
    cp -a "$root/var/cache/slimserve/." "$cache"
    chown --reference="$root/var/cache/slimserve" "$cache"
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    mount --bind "$cache" "$root/var/cache/slimserve"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    ip link set lo up

    if eval "$enter touch /tmp/probe '$workdir/probe'" 2>/dev/null; then fail "the root file system is writable"; fi
    start=$(date +%s)
    eval "exec $enter $command" >"$work/serve.log" 2>&1 &
    server=$!
    until eval "$enter $health" >/dev/null 2>&1; do
        kill -0 "$server" 2>/dev/null || fail "the server ended before it was ready" "$work/serve.log"
        [ $(($(date +%s) - start)) -lt "$ready_limit_s" ] || fail "not ready after $ready_limit_s s" "$work/serve.log"
        sleep 1
    done
    ready_s=$(($(date +%s) - start))
    eval "$enter python3 -c \"\$requests\"" || fail "a request failed" "$work/serve.log"
    stop=$(date +%s)
    kill -TERM "$server"
    status=0
    wait "$server" || status=$?
    echo "$ready_s $(($(date +%s) - stop)) $status" >"$work/times"
}

requests='
import json, urllib.request
def post(path, body):
    request = urllib.request.Request("http://127.0.0.1:8000" + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))
model = json.load(urllib.request.urlopen("http://127.0.0.1:8000/v1/models", timeout=30))["data"][0]["id"]
messages = [{"role": "user", "content": "What is the capital of France?"}]
chat = post("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 16})
assert chat["choices"][0]["message"]["content"], chat
score = post("/v1/score", {"model": model, "query": "The capital of France is", "items": [" Paris. True or false? Answer:"],
    "labels": [" true", " false"], "apply_softmax": True})
assert abs(sum(score["scores"][0]) - 1) < 1e-3, score
print("image-check: chat:", repr(chat["choices"][0]["message"]["content"]), "score:", score["scores"][0])
'

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit
fi

# --- The build. ---

cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || fail "run it as root: it mounts file systems and changes users"
for tool in buildah mmdebstrap ip:iproute2 unshare:util-linux; do
    sh requirements/system.sh "${tool%:*}" "${tool#*:}" "the check of the container image"
    command -v "${tool%:*}" >/dev/null || exit 2
done

if [ -n "${IMAGE_CHECK_DIR:-}" ]; then
    work=$(mkdir -p "$IMAGE_CHECK_DIR" && cd "$IMAGE_CHECK_DIR" && pwd)
else
    work=$(mktemp -d)
fi
container=
in_storage() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
clean_up() {
    [ -z "$container" ] || in_storage rm "$container" >/dev/null
    [ -n "${IMAGE_CHECK_DIR:-}" ] || { in_storage rmi --all --force >/dev/null 2>&1 || true; rm -rf "$work"; }
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# The base image gets the name that the Dockerfile expects.
base=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)
if ! in_storage images "docker.io/library/$base" >/dev/null 2>&1; then
    print_status "making the base image $base from Debian bookworm"
    apt-config dump | grep -E '^Acquire::(Retries|https?::(Proxy|CaInfo|Timeout))' >"$work/apt.conf" || true
    find /etc/apt/sources.list /etc/apt/sources.list.d -name '*.list' -o -name '*.sources' 2>/dev/null >"$work/sources" || true
    xargs -d '\n' mmdebstrap --quiet --variant=minbase --aptopt="$work/apt.conf" \
        --include=ca-certificates,netbase,tzdata,python3,python3-dev,python3-venv \
        bookworm "$work/base.tar" <"$work/sources" 2>"$work/base.log" || fail "mmdebstrap failed" "$work/base.log"
    container=$(in_storage from scratch)
    in_storage add --quiet "$container" "$work/base.tar" / >/dev/null
    in_storage config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
    in_storage commit --quiet --rm "$container" "docker.io/library/$base" >/dev/null
    container=
    rm "$work/base.tar"
fi

# pip's configuration becomes the image's /etc/pip.conf for the build, and the files that it names are mounted beside it.
"$python" -m pip config list >"$work/pip.list" 2>/dev/null || true
"$python" - "$work" <<'PYTHON'
import ast, pathlib, sys
work = pathlib.Path(sys.argv[1])
values, paths = {}, set()
lines = [line.partition("=") for line in (work / "pip.list").read_text().splitlines()]
for key, _, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):  # variables win over files
    values[key.rpartition(".")[2]] = ast.literal_eval(value)
for word in (word for value in values.values() for word in value.split()):
    path = pathlib.Path(word.removeprefix("file://"))
    if path.is_absolute() and path.exists():
        # An index on disk links to files beside its own folder.
        paths.add(path.parent if word.startswith("file://") else path)
(work / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {' '.join(value.split())}\n" for key, value in values.items()))
mounts = [f"{work / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(paths))]
(work / "volumes").write_text("".join(f"--volume\n{mount}\n" for mount in mounts))
PYTHON

print_status "building the image; the log is $work/build.log"
xargs -d '\n' buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs build --isolation chroot \
    --format docker --pull-never --tag "$image" --file Dockerfile <"$work/volumes" >"$work/build.log" 2>&1 \
    || fail "the build failed" "$work/build.log"
size=$(in_storage images --format '{{.Size}}' "$image")
in_storage inspect --type image "$image" >"$work/image.json"

print_status "starting the image; the log is $work/serve.log"
container=$(in_storage from --pull-never "$image")
root=$(in_storage mount "$container")
cache=$work/cache
rm -rf "$cache" && mkdir -p "$cache"
unshare --mount --pid --net --ipc --uts --fork --kill-child --propagation private \
    sh "$0" --inside "$root" "$cache" "$work"
read -r ready_s stop_s status <"$work/times"
[ "$status" = 0 ] || fail "the server ended with status $status after SIGTERM" "$work/serve.log"
echo "image-check: passed: image $size, ready after $ready_s s with an empty cache, chat and score answered, stopped in $stop_s s"
