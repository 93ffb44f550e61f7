# On each of two hosts: sh on_two_hosts.sh FIRST OWN INTERFACE
# FIRST is the address of the first host, OWN that of this one, and INTERFACE
# the network card that has it.
first=$1 own=$2 interface=$3
export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface

# The first host keeps the store where all meet. torchrun would guess which one
# that is from the host's name, and be wrong where the name is a loopback address.
if [ "$first" = "$own" ]; then keeps=true; else keeps=false; fi

exec torchrun --nnodes 2 --nproc-per-node "${RANKS:-2}" --local-addr "$own" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29400}" --rdzv-id moespec \
    --rdzv-conf "is_host=$keeps,join_timeout=120" expert_parallel_on_hosts.py
