# Two hosts on one machine: ranks in two network namespaces, each half under a kernel identity of its own.
#   unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc bash two_hosts.sh RANKS ..
# runs PROGRAM as RANKS ranks, half on each; ends with the last status that is not 0. For RANKS 0 it is run once on each,
# as a launcher that starts ranks itself, with HOST_ADDRESS and IS_FIRST set. RATE, such as 1gbit, is that of the network between them
# each way; unlimited by default.
set -e
ranks=$1
shift
ip link set lo up
unshare --net sleep 600 &
other=$!
sleep 0.2
ip link add first type veth peer name second
ip link set second netns $other
ip addr add 10.9.0.1/24 dev first
ip link set first up
there() { nsenter --target $other --net "$@"; }
there ip link set lo up
there ip addr add 10.9.0.2/24 dev second
there ip link set second up
if [ -n "$RATE" ]; then
  tc qdisc add dev first root tbf rate $RATE burst 256kb latency 100ms
  there tc qdisc add dev second root tbf rate $RATE burst 256kb latency 100ms
fi
kernels=$(mktemp -d)
trap 'rm -r $kernels' EXIT
echo first > $kernels/first
echo second > $kernels/second
with_kernel='mount --bind "$0" /proc/sys/kernel/random/boot_id; exec "$@"'
if [ $ranks = 0 ]; then
  HOST_ADDRESS=10.9.0.1 IS_FIRST=1 GLOO_SOCKET_IFNAME=first unshare --mount bash -c "$with_kernel" $kernels/first "$@" &
  launcher=$!
  HOST_ADDRESS=10.9.0.2 IS_FIRST=0 GLOO_SOCKET_IFNAME=second there unshare --mount bash -c "$with_kernel" $kernels/second "$@"
  wait $launcher
  exit
fi
export MASTER_ADDR=10.9.0.1 MASTER_PORT=29500 WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$((ranks / 2))
start() {  # rank, host, command before it
  rank=$1 host=$2
  shift 2
  RANK=$rank LOCAL_RANK=$((rank % (ranks / 2))) GLOO_SOCKET_IFNAME=$host "$@" &
  started="$started $!"
}
for rank in $(seq 0 $((ranks - 1))); do
  if [ $rank -lt $((ranks / 2)) ]; then
    start $rank first unshare --mount bash -c "$with_kernel" $kernels/first "$@"
  else
    start $rank second there unshare --mount bash -c "$with_kernel" $kernels/second "$@"
  fi
done
status=0
for process in $started; do wait $process || status=$?; done
exit $status
