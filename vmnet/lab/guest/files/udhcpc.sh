#!/bin/sh
# udhcpc calls this with what the DHCPv4 server said.
resolver() {
    : >/run/resolv/$1
    [ -n "$2" ] && echo "search $2" >>/run/resolv/$1
    for server in $3; do
        echo "nameserver $server" >>/run/resolv/$1
    done
    /etc/resolver
}
# What happened to the lease, for those who look whether it ever came to an end.
echo "$(cut -d' ' -f1 /proc/uptime) $interface $1 $serverid $ip" >>/run/leases
case $1 in
    deconfig)
        ip -4 addr flush dev "$interface"
        ;;
    bound|renew)
        [ -n "$mtu" ] && ip link set dev "$interface" mtu "$mtu"
        # Replaced, never flushed first: a renewal must not interrupt a connection.
        for old in $(ip -4 -o addr show dev "$interface" | awk '{print $4}'); do
            [ "$old" = "$ip/$mask" ] || ip -4 addr del "$old" dev "$interface"
        done
        ip -4 addr replace "$ip/$mask" dev "$interface" valid_lft forever preferred_lft forever 2>/dev/null ||
            ip -4 addr add "$ip/$mask" dev "$interface" 2>/dev/null
        if [ -n "$staticroutes" ]; then
            set -- $staticroutes
            while [ $# -ge 2 ]; do
                if [ "$2" = 0.0.0.0 ]; then
                    ip -4 route replace "$1" dev "$interface"
                else
                    ip -4 route replace "$1" via "$2" dev "$interface"
                fi
                shift 2
            done
        else
            for gateway in $router; do
                ip -4 route replace default via "$gateway" dev "$interface"
                break
            done
        fi
        [ -n "$hostname" ] && hostname "$hostname"
        resolver "v4-$interface" "${search:-$domain}" "$dns"
        ;;
esac
