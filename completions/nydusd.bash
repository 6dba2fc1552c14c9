# bash completion for nydusd; made by scripts/reference: do not edit.
_nydusd() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' i word
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --apisock|--bootstrap|--config|--dedup-db|--driver|--failover-policy|--fscache|--fscache-tag|--fscache-threads|--fuse-threads|--id|--localfs-dir|--log-file|--log-level|--log-rotation-size|--mountpoint|--prefetch-files|--rlimit-nofile|--shared-dir|--socket|--supervisor|--thread-num|--virtual-mountpoint|-A|-B|-C|-D|-F|-L|-M|-S|-l|-m|-s) ((i++)); continue ;;
        esac
        case "$path/$word" in
            /fuse|/erofs|/blobfs|/nbd|/singleton|/virtiofs|/uffd|/help) path=$path/$word ;;
        esac
    done
    case "$path $prev" in
        " -A"|" --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " -C"|" --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " --id") COMPREPLY=(); return ;;
        " --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " -l"|" --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        " -L"|" --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " --log-rotation-size") COMPREPLY=(); return ;;
        " --rlimit-nofile") COMPREPLY=(); return ;;
        " -M"|" --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        " --failover-policy") COMPREPLY=($(compgen -W 'none resend flush' -- "$cur")); return ;;
        " --fuse-threads"|" --thread-num") COMPREPLY=(); return ;;
        " -B"|" --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " -D"|" --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        " -s"|" --shared-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        " --prefetch-files") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " -m"|" --virtual-mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        " --dedup-db") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse -A"|"/fuse --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse -C"|"/fuse --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse --id") COMPREPLY=(); return ;;
        "/fuse --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse -l"|"/fuse --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/fuse -L"|"/fuse --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse --log-rotation-size") COMPREPLY=(); return ;;
        "/fuse --rlimit-nofile") COMPREPLY=(); return ;;
        "/fuse -M"|"/fuse --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/fuse --failover-policy") COMPREPLY=($(compgen -W 'none resend flush' -- "$cur")); return ;;
        "/fuse --fuse-threads"|"/fuse --thread-num") COMPREPLY=(); return ;;
        "/fuse -B"|"/fuse --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse -D"|"/fuse --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/fuse -s"|"/fuse --shared-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/fuse --prefetch-files") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse -m"|"/fuse --virtual-mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/fuse --dedup-db") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs -A"|"/erofs --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs -C"|"/erofs --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs --id") COMPREPLY=(); return ;;
        "/erofs --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs -l"|"/erofs --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/erofs -L"|"/erofs --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs --log-rotation-size") COMPREPLY=(); return ;;
        "/erofs --rlimit-nofile") COMPREPLY=(); return ;;
        "/erofs -M"|"/erofs --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/erofs -B"|"/erofs --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs -D"|"/erofs --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/erofs --prefetch-files") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/erofs --fuse-threads"|"/erofs --thread-num") COMPREPLY=(); return ;;
        "/erofs --driver") COMPREPLY=($(compgen -W 'auto tarfs fanotify blobfs fuse' -- "$cur")); return ;;
        "/blobfs -A"|"/blobfs --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs -C"|"/blobfs --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs --id") COMPREPLY=(); return ;;
        "/blobfs --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs -l"|"/blobfs --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/blobfs -L"|"/blobfs --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs --log-rotation-size") COMPREPLY=(); return ;;
        "/blobfs --rlimit-nofile") COMPREPLY=(); return ;;
        "/blobfs -M"|"/blobfs --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/blobfs -B"|"/blobfs --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs -D"|"/blobfs --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/blobfs --prefetch-files") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/blobfs --fuse-threads"|"/blobfs --thread-num") COMPREPLY=(); return ;;
        "/nbd -A"|"/nbd --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd -C"|"/nbd --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd --id") COMPREPLY=(); return ;;
        "/nbd --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd -l"|"/nbd --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/nbd -L"|"/nbd --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd --log-rotation-size") COMPREPLY=(); return ;;
        "/nbd --rlimit-nofile") COMPREPLY=(); return ;;
        "/nbd -S"|"/nbd --socket") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd -B"|"/nbd --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/nbd -D"|"/nbd --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/nbd --prefetch-files") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/singleton -A"|"/singleton --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/singleton -C"|"/singleton --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/singleton --id") COMPREPLY=(); return ;;
        "/singleton --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/singleton -l"|"/singleton --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/singleton -L"|"/singleton --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/singleton --log-rotation-size") COMPREPLY=(); return ;;
        "/singleton --rlimit-nofile") COMPREPLY=(); return ;;
        "/singleton -F"|"/singleton --fscache") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/singleton --fscache-tag") COMPREPLY=(); return ;;
        "/singleton --fscache-threads") COMPREPLY=(); return ;;
        "/virtiofs -A"|"/virtiofs --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/virtiofs -C"|"/virtiofs --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/virtiofs --id") COMPREPLY=(); return ;;
        "/virtiofs --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/virtiofs -l"|"/virtiofs --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/virtiofs -L"|"/virtiofs --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/virtiofs --log-rotation-size") COMPREPLY=(); return ;;
        "/virtiofs --rlimit-nofile") COMPREPLY=(); return ;;
        "/uffd -A"|"/uffd --apisock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/uffd -C"|"/uffd --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/uffd --id") COMPREPLY=(); return ;;
        "/uffd --supervisor") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/uffd -l"|"/uffd --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/uffd -L"|"/uffd --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/uffd --log-rotation-size") COMPREPLY=(); return ;;
        "/uffd --rlimit-nofile") COMPREPLY=(); return ;;
    esac
    case "$path" in
        '') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -M --mountpoint --failover-policy --fuse-threads --thread-num --writable -B --bootstrap -D --localfs-dir -s --shared-dir --prefetch-files -m --virtual-mountpoint --dedup-db fuse erofs blobfs nbd singleton virtiofs uffd help' -- "$cur")) ;;
        '/fuse') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -M --mountpoint --failover-policy --fuse-threads --thread-num --writable -B --bootstrap -D --localfs-dir -s --shared-dir --prefetch-files -m --virtual-mountpoint --dedup-db' -- "$cur")) ;;
        '/erofs') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -M --mountpoint -B --bootstrap -D --localfs-dir --prefetch-files --fuse-threads --thread-num --driver' -- "$cur")) ;;
        '/blobfs') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -M --mountpoint -B --bootstrap -D --localfs-dir --prefetch-files --fuse-threads --thread-num' -- "$cur")) ;;
        '/nbd') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -S --socket -B --bootstrap -D --localfs-dir --prefetch-files' -- "$cur")) ;;
        '/singleton') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version -F --fscache --fscache-tag --fscache-threads' -- "$cur")) ;;
        '/virtiofs') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version' -- "$cur")) ;;
        '/uffd') COMPREPLY=($(compgen -W '-A --apisock -C --config --id --supervisor -l --log-level -L --log-file --log-rotation-size --rlimit-nofile --upgrade -h --help -V --version' -- "$cur")) ;;
        '/help') COMPREPLY=($(compgen -W '' -- "$cur")) ;;
    esac
}
complete -F _nydusd nydusd
