{{/* Parts of NetworkPolicies. */}}

{{/* Peers: the pods of some components of this release. Takes root, components. */}}
{{- define "kleash.peers" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
      app.kubernetes.io/instance: {{ .root.Release.Name }}
    matchExpressions:
      - key: app.kubernetes.io/component
        operator: In
        values:
          {{- toYaml .components | nindent 10 }}
{{- end -}}

{{/* Ports, TCP. Takes a list of numbers. */}}
{{- define "kleash.tcp" -}}
{{- $ports := list -}}
{{- range . }}{{ $ports = append $ports (dict "port" . "protocol" "TCP") }}{{ end -}}
{{- toYaml $ports -}}
{{- end -}}

{{/* Peers by addresses. Takes a list of CIDRs. */}}
{{- define "kleash.blocks" -}}
{{- $blocks := list -}}
{{- range . }}{{ $blocks = append $blocks (dict "ipBlock" (dict "cidr" .)) }}{{ end -}}
{{- toYaml $blocks -}}
{{- end -}}

{{/* Rules that let a pod in. Takes root, component, services: those that it serves. */}}
{{- define "kleash.ingress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if .services -}}
{{- $callers := include "kleash.callersOf" (merge (dict "keys" .services) .) | fromJsonArray -}}
- from:
    {{- include "kleash.peers" (dict "root" .root "components" $callers) | nindent 4 }}
    {{- range .services }}
    {{- with index $policy (printf "%sClients" .) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
  ports:
    {{- include "kleash.tcp" (list 50051) | nindent 4 }}
{{- if include "kleash.hasHttp" . }}
{{- /* Without a peer the rule would let everybody in. */}}
{{- with concat $policy.rewardClients $policy.rewardHttpClients }}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 8080) | nindent 4 }}
{{- end }}
{{- end }}
{{- else if eq .component "trainer" -}}
{{- if or .root.Values.policy.enabled $policy.weightsClients }}
- from:
    {{- if .root.Values.policy.enabled }}
    {{- include "kleash.peers" (dict "root" .root "components" (list (include "kleash.componentOf" (dict "root" .root "service" "policy")))) | nindent 4 }}
    {{- end }}
    {{- with $policy.weightsClients }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    {{- include "kleash.tcp" (list 50061) | nindent 4 }}
{{- end }}
- from:
    {{- include "kleash.peers" (dict "root" .root "components" (list "test")) | nindent 4 }}
    {{- with $policy.trainerClients }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    {{- include "kleash.tcp" (list 50051) | nindent 4 }}
{{- if and $policy.trainerClients (include "kleash.hasHttp" (dict "root" .root "services" (list "trainer"))) }}
- from:
    {{- toYaml $policy.trainerClients | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 8080) | nindent 4 }}
{{- end }}
{{- end }}
{{- if and $policy.monitoringNamespace (or .services (eq .component "trainer")) }}
- from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ $policy.monitoringNamespace }}
  ports:
    {{- include "kleash.tcp" (list 9090) | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Rules that let a pod out. Takes root, component, services. */}}
{{- define "kleash.egress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- $serving := include "kleash.servingComponents" .root | fromJsonArray -}}
{{- if ne .component "demo" -}}
- ports:
    {{- range $port := $policy.dns.ports }}
    {{- range $protocol := list "UDP" "TCP" }}
    - port: {{ $port }}
      protocol: {{ $protocol }}
    {{- end }}
    {{- end }}
  {{- with $policy.dns.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- if and $serving (has .component (list "trainer" "test")) }}
- to:
    {{- include "kleash.peers" (dict "root" .root "components" $serving) | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 50051) | nindent 4 }}
{{- end }}
{{- if and (eq .component "test") .root.Values.trainer.enabled }}
- to:
    {{- include "kleash.peers" (dict "root" .root "components" (list "trainer")) | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 50051) | nindent 4 }}
{{- end }}
{{- if has "policy" .services }}
# Weights: from the trainer's store, and from other replicas.
- to:
    {{- include "kleash.peers" (dict "root" .root "components" (list "trainer")) | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 50061) | nindent 4 }}
- to:
    {{- include "kleash.peers" (dict "root" .root "components" (list .component)) | nindent 4 }}
  ports:
    {{- include "kleash.tcp" (list 50051) | nindent 4 }}
{{- end }}
{{- if include "kleash.callsApi" . }}
- to:
    {{- include "kleash.blocks" $policy.apiServer.cidrs | nindent 4 }}
  ports:
    {{- include "kleash.tcp" $policy.apiServer.ports | nindent 4 }}
{{- end }}
{{- if include "kleash.downloads" . }}
- to:
    {{- include "kleash.blocks" $policy.downloads.cidrs | nindent 4 }}
  ports:
    {{- include "kleash.tcp" $policy.downloads.ports | nindent 4 }}
{{- end }}
{{- if and .root.Values.tracing.endpoint (or .services (eq .component "trainer")) }}
{{- with .root.Values.tracing.egress }}
# Spans: to the collector.
{{ toYaml . }}
{{- end }}
{{- end }}
{{- with (index .root.Values (include "kleash.valuesKey" .component)).extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
